"""The cache as a command of its own, by one process and by two at once."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from safetydpo_jax.command_line import pop_option
from safetydpo_jax.data import Cache, Picture, write_pairs
from safetydpo_jax.data import encode as encoding
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.processes import LOST
from safetydpo_jax.train import base
from safetydpo_jax.train.cache import run
from safetydpo_jax.train.workdir import part_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pairs(tmp_path):
    """Twelve pairs and six pictures besides, of noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 64, 64, 3), np.uint8)
    pictures = [Picture(f"{i}", f"a photo of a word {i}", i, x) for i, x in enumerate(pixels)]
    write_pairs(tmp_path / "pairs", pictures[:12], pictures[12:24], pictures[24:], {})
    return tmp_path / "pairs"


def command(model_folder, pairs, workdir, *more):
    options = [f"--config.model={model_folder}", f"--config.pairs.path={pairs}"]
    options = ["--config", "hate", *options, "--workdir", str(workdir)]
    return [sys.executable, str(ROOT / "launch" / "cache.py"), *options, *more]


@pytest.fixture
def config(model_folder, pairs):
    config = common.get_config("hate")
    config.model, config.pairs.path = str(model_folder), str(pairs)
    return config


@pytest.mark.usefixtures("optimised")
def test_two_processes_make_what_one_does(config, model_folder, pairs, tmp_path):
    said = []
    one = run(config, tmp_path / "one", progress=said.append)
    assert any(line.startswith("cache         ") for line in said)
    several = [
        subprocess.Popen(
            command(model_folder, pairs, tmp_path / "two", f"--part={i}/2"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in several:
        out, _ = process.communicate()
        assert process.returncode == 0, out
        assert "a word" not in out
    two = Cache(tmp_path / "two" / "cache")
    assert two.key == one.key
    records = np.arange(30)
    jax.tree.map(np.testing.assert_array_equal, one.read(records), two.read(records))


def test_the_unets_weights_are_not_read(config, tmp_path, monkeypatch):
    loaded = []

    def noted(*args, **options):
        loaded.append(load_pipeline(*args, **options))
        return loaded[0]

    monkeypatch.setattr(base, "load_pipeline", noted)
    monkeypatch.setattr(encoding, "ENCODE_BATCH", 16)
    assert run(config, tmp_path / "run", (0, 2), lambda line: None) is None
    assert loaded[0].params.keys() == {"vae", "text_encoder"}


def test_parts():
    assert part_of("") == (0, 1)
    assert part_of("2/4") == (2, 4)
    with pytest.raises(UserError, match="'4/4': parts are numbered from 0"):
        part_of("4/4")
    for text in ("2", "a/b", "-1/4"):
        with pytest.raises(UserError, match="write it as 0/4"):
            part_of(text)


def test_a_part_whose_others_did_not_come_is_to_be_started_again(monkeypatch, capfd):
    said = "error: the other processes did not come"
    done = subprocess.CompletedProcess([], LOST, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(SystemExit) as ended:
        part_of("auto")
    assert ended.value.code == LOST
    assert capfd.readouterr().err == said


def test_an_option_of_its_own():
    assert pop_option(["x", "--part", "1/2", "y"], "--part") == ("1/2", ["x", "y"])
    assert pop_option(["x", "--part=1/2"], "--part") == ("1/2", ["x"])
    assert pop_option(["x"], "--part") == ("", ["x"])
    for argv in (["--part"], ["--part="], ["--part", "--config"]):
        with pytest.raises(UserError, match="--part is empty"):
            pop_option(argv, "--part")


def test_pairs_of_another_category(config, tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    picture = Picture("0", "a word", 0, pixels)
    card = {"settings": {"category": "violence"}}
    write_pairs(tmp_path / "others", [picture], [picture], [], card)
    config.pairs.path = str(tmp_path / "others")
    with pytest.raises(UserError, match="has pairs of violence, and this expert is of hate"):
        run(config, tmp_path / "run", progress=lambda line: None)


def test_no_pairs(model_folder, tmp_path):
    done = subprocess.run(
        command(model_folder, "none", tmp_path / "run"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no folder none: ")
