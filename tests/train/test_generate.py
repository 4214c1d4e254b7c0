"""Pairs and no training: of a tiny random checkpoint, for a harm of the user's."""

import pytest

from configs import common, own
from safetydpo_jax.data import PairSet
from safetydpo_jax.data.sources import WORDINGS
from safetydpo_jax.errors import UserError
from safetydpo_jax.train import base, generate, loop

SECRET = "a quarrel in words"


@pytest.fixture
def config(model_folder, tmp_path):
    (tmp_path / "harm").mkdir()
    (tmp_path / "harm" / "prompts.csv").write_text(f"unsafe,safe\n{SECRET},a talk\na fight,a hug\n")
    config = own.get_config("sd15")
    config.model = str(model_folder)
    config.harm = str(tmp_path / "harm")
    config.pairs.num_pairs, config.drawing.num_steps, config.drawing.batch_size = 3, 1, 4
    return config


def test_pairs_are_drawn_once_and_said(config, tmp_path):
    lines = []
    folder = generate.run(config, tmp_path / "run", progress=lines.append)
    said = "\n".join(lines)
    assert folder == tmp_path / "run" / "pairs"
    assert f"{folder}: 3 pairs, 0 preservation pictures" in said
    assert "2 pairs of prompts, 3 of pictures are drawn" in lines
    assert f"--config.pairs.path={folder}" in said
    assert SECRET not in said
    pairs = PairSet(folder)
    assert (pairs.card["counts"]["kept"], pairs.card["settings"]["category"]) == (3, "harm")
    assert "unjudged" in pairs.card["settings"]["source"]
    assert len({picture.id for picture in pairs.pictures("unsafe")}) == 3
    assert {p.prompt for p in pairs.pictures("unsafe")} == {SECRET, "a fight"}
    assert sorted(p.name for p in folder.parent.iterdir()) == [".lock", ".pairs.lock", "pairs"]

    again = []
    assert generate.run(config, tmp_path / "run", progress=again.append) == folder
    assert f"pairs: 3 found in {folder}" in again


def test_another_file_is_another_set(config, tmp_path):
    generate.run(config, tmp_path / "run", progress=lambda line: None)
    other = tmp_path / "other.yaml"
    other.write_text("name: harm\nconcepts: [{unsafe: quarrel, safe: talk}]")
    config.harm, lines = str(other), []
    with pytest.raises(UserError, match="pairs was made with prompts_hash"):
        generate.run(config, tmp_path / "run", progress=lines.append)
    count = len(WORDINGS)  # of the one concept
    (said,) = (line for line in lines if "pairs of prompts" in line)
    assert said.startswith(f"{count} pairs of prompts, 3 of pictures are drawn: {count - 3} stay")
    assert said.endswith(f"unless you give --config.pairs.num_pairs={count}")


def test_what_the_base_cannot_do_is_told_before_anything_is_drawn(config, tmp_path):
    quiet = {"progress": lambda line: None}
    made = generate.run(config, tmp_path / "made", **quiet)
    config.drawing.num_steps = 2000
    with pytest.raises(UserError, match="num_steps is 2000: it must be from 1 to 1000"):
        generate.run(config, tmp_path / "run", **quiet)
    assert not list((tmp_path / "run").glob("pairs*"))
    config.pairs.path = str(made)
    config.batch_size, config.accumulation = 8, 1
    config.health.every, config.health.prompts = 1, ("a dog",)
    with pytest.raises(UserError, match="num_steps is 2000: it must be from 1 to 1000"):
        loop.run(config, tmp_path / "run", **quiet)
    config.cache.resolution = 7
    with pytest.raises(UserError, match="config.cache.resolution is 7: it must be a multiple of"):
        loop.run(config, tmp_path / "run", **quiet)
    assert not list((tmp_path / "run").glob("cache*"))


def test_training_draws_nothing_unasked(config, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_pipeline", None)
    with pytest.raises(UserError, match=r"draws no pairs with sd15 unasked.*launch/generate.py"):
        loop.run(config, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_category_has_no_prompts_for_other_models(tmp_path):
    config = common.get_config("hate", "sd15")
    with pytest.raises(
        UserError, match=r"no prompts of hate .*for sd15.*CoProV2.*--config own:sd15"
    ):
        generate.run(config, tmp_path / "run", progress=lambda line: None)


def test_pairs_that_are_there(config, tmp_path):
    config.pairs.path = "somewhere"
    with pytest.raises(UserError, match="config.pairs.path is somewhere: .* nothing to make"):
        generate.run(config, tmp_path / "run", progress=lambda line: None)
