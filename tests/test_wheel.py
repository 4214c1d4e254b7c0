"""The job from a fresh environment with nothing but the wheel, which is built from the sdist.

pip fetches every dependency, 1.3 GB unpacked, and no more: one that is not declared would show. So
it needs a network, and two to four minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from safetydpo_jax import __version__
from safetydpo_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
BUILD = "from hatchling.build import build_sdist as build; import sys; print(build(sys.argv[1]))"
WHERE = "from safetydpo_jax.command_line import ROOT; print(ROOT)"
NOTICES = ("LICENSE", "safetydpo_jax/emoji/NOTICE-artwork.md")
# As little as runs through all phases.
SETTINGS = {
    "steps": 2,
    "batch_size": 2,
    "preserve_batch_size": 2,
    "checkpoint.every": 1,
    "drawing.num_steps": 8,
    "drawing.batch_size": 4,
    "pairs.num_pairs": 2,
    "pairs.preserve_count": 2,
    "health.num_unsafe": 2,
    "health.num_safe": 2,
    "report.num_unsafe": 2,
    "report.num_safe": 2,
}


def run(command, **options):
    """Its output, without this repository on sys.path and with the machine's own devices."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment | options.pop("env", {}),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bin_folder():
    """Of a new environment, with the wheel and what pip finds that it depends on."""
    # pytest would keep the last three; they are large.
    with tempfile.TemporaryDirectory() as folder:
        yield install(Path(folder))


def install(folder):
    bin_folder = folder / "venv" / "bin"
    run([sys.executable, "-m", "venv", folder / "venv"])
    python, tools, dist = bin_folder / "python", folder / "tools", folder / "dist"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "--target", tools, "hatchling"])
    run([python, "-c", BUILD, dist], cwd=ROOT, env={"PYTHONPATH": str(tools)})
    (sdist,) = dist.iterdir()
    run([*pip, "wheel", "--no-deps", "--wheel-dir", dist, sdist])
    (wheel,) = dist.glob("*.whl")
    assert wheel.stat().st_size < 30e6
    run([*pip, "install", wheel])
    return bin_folder


@pytest.mark.slow
def test_what_is_installed(bin_folder, tmp_path):
    share = Path(run([bin_folder / "python", "-c", WHERE], cwd=tmp_path).strip())
    assert share.is_relative_to(bin_folder.parent)
    # It comes first on sys.path: whatever else it held could hide another package.
    assert {path.name for path in share.iterdir()} == {"configs", "docs", "examples", "launch"}
    assert {path.stem for path in (share / "launch").glob("*.py")} == set(COMMANDS)
    licenses = share.parents[1] / f"safetydpo_jax-{__version__}.dist-info" / "licenses"
    for notice in NOTICES:
        assert (licenses / notice).read_bytes() == (ROOT / notice).read_bytes()


@pytest.mark.slow
def test_train_and_sample(bin_folder, tmp_path):
    program = bin_folder / "safetydpo"
    assert "  train  " in run([program, "--help"], cwd=tmp_path)
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    run([program, "train", "--config", "hate", *settings], cwd=tmp_path)
    workdir = tmp_path / "runs" / "hate"
    expert = workdir / "export" / "pytorch_lora_weights.safetensors"
    assert any((value != 0).any() for key, value in load_file(expert).items() if "lora_B" in key)
    summary = json.loads((workdir / "report" / "summary.json").read_text())
    assert (summary["num_unsafe"], summary["num_safe"]) == (2, 2)
    assert (workdir / "report" / "grid.png").is_file()

    what = ["--model", "emoji", "--lora", expert, "--prompt", "a red apple", "--steps", "2"]
    run([program, "sample", *what, "--out", "pictures"], cwd=tmp_path)
    assert (tmp_path / "pictures" / "picture_0.png").is_file()
