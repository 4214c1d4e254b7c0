"""From concepts to caches, of a tiny random checkpoint, with a server that writes the prompts."""

import json

import pytest

from configs import coprov2
from safetydpo_jax.command_line import ROOT
from safetydpo_jax.data import Cache, PairSet
from safetydpo_jax.data.writing.concepts import read_concepts
from safetydpo_jax.data.writing.sources import Writer
from safetydpo_jax.emoji.concepts import HARMS
from safetydpo_jax.emoji.own_harm import listed
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.train import factory, loop
from safetydpo_jax.train.settings import resolve
from tests.data.chat_server import Server, judged, pairs_for

SECRET = "secretword"


@pytest.fixture
def config(model_folder, tmp_path):
    """Of two categories, three pairs of one and two of the other."""
    table = tmp_path / "concepts.csv"
    table.write_text(f"category,concept\nhate,{SECRET} one\nviolence,{SECRET} two\n")
    config = coprov2.get_config("sd15")
    config.model = str(model_folder)
    config.writer.update({"concepts": str(table), "model": "good", "per_concept": 12})
    config.pairs.num_pairs, config.drawing.num_steps, config.drawing.batch_size = 5, 1, 4
    return config


@pytest.fixture
def emoji():
    return coprov2.get_config()


def test_from_concepts_to_caches(config, tmp_path):
    lines = []
    with Server() as server:
        config.writer.endpoint = server.url
        options = "--config.model=MODEL"
        folder = factory.run(config, tmp_path / "run", progress=lines.append, options=options)
        assert server.asked.total() == 8  # in four requests, each judged
    said = "\n".join(lines)
    assert f"{folder}: 5 of 5 pairs, 0 preservation pictures" in said
    workdir, kept_of = tmp_path / "run", {}
    for name, count, concept in (("hate", 2, "one"), ("violence", 3, "two")):
        pairs, cache = PairSet(folder / name), Cache(workdir / name / "cache")
        assert (pairs.num_pairs, cache.num_pairs, cache.orientations) == (count, count, 2)
        written = pairs_for(f"{SECRET} {concept}", 10, 10) + pairs_for(f"{SECRET} {concept}", 20, 2)
        kept = {pair["unsafe"] for pair in judged(written)}
        drawn = {picture.prompt for picture in pairs.pictures("unsafe")}
        assert len(drawn) == count
        assert drawn <= kept
        kept_of[name] = kept
    card = (folder / "README.md").read_text()
    assert "| all | 5 | 5 | 0 | 6 |" in card
    assert (folder / "pairs.png").is_file()
    assert SECRET not in said + card
    for name in ("hate", "violence"):
        harm = tmp_path / "run" / "prompts" / name
        command = f"safetydpo train --config {name}:sd15 --config.model=MODEL --config.harm={harm}"
        assert f"{command} --config.pairs.path={folder / name} --workdir" in said
    facts = json.loads(card.split("```json")[1].split("```")[0])
    assert facts["writer"]["settings"]["model"] == "good"
    assert facts["writer"]["categories"]["hate"]["kept"] == len(kept_of["hate"])

    again = []  # the server is gone
    assert factory.run(config, workdir, progress=again.append) == folder
    assert (folder / "README.md").read_text() == card
    assert f"pairs: 2 found in {folder / 'hate'}" in again
    config.writer.per_concept = 13
    with pytest.raises(UserError, match="prompts was made with per_concept = 12, but now it is 13"):
        factory.run(config, workdir, progress=again.append)


def test_what_cannot_be(config, emoji, tmp_path):
    def message(given, **values):
        config = given.copy_and_resolve_references()
        config.update_from_flattened_dict(values)
        with pytest.raises(UserError) as raised:
            factory.run(config, tmp_path / "run", progress=lambda line: None)
        return str(raised.value)

    assert "one for each category" in message(emoji, **{"pairs.num_pairs": 6})
    assert "nothing to make" in message(emoji, **{"pairs.path": "x"})
    assert "config.cache.dtype is 'float8'" in message(emoji, **{"cache.dtype": "float8"})
    assert "config.drawing.sampler is 'x'" in message(emoji, **{"drawing.sampler": "x"})
    assert "config.pairs.seed is -1" in message(emoji, **{"pairs.seed": -1})
    assert "config.recipe is 'x'" in message(emoji, recipe="x")
    for given, writer in ((config, "grammar"), (emoji, "good")):
        assert "is for emoji alone" in message(given, **{"writer.model": writer})
    assert "nowhere: no such folder" in message(config, model="/nowhere")
    assert "and who is to write" in message(config, **{"writer.model": ""})
    assert "there is no such file" in message(
        config, **{"writer.model": "x", "writer.concepts": "x"}
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["pairs", "prompts", "cache", "Safe"])
def test_categories_that_cannot_be(config, tmp_path, name):
    table = tmp_path / "concepts.csv"
    table.write_text(f"category,concept\n{name},{SECRET}\n")
    config.writer.endpoint = "http://localhost:1/v1"
    with pytest.raises(UserError, match=f"the name {name} is taken: call the category otherwise"):
        factory.run(config, tmp_path / "run", progress=lambda line: None)


def test_fewer_prompts_than_pairs_are_said(config, tmp_path):
    lines = []
    with Server() as server:
        config.writer.update({"endpoint": server.url, "per_concept": 1})
        factory.run(config, tmp_path / "run", progress=lines.append)
    assert "prompts: hate, 1 for 2 pairs: each is drawn 2.0 times" in lines
    assert "prompts: violence, 1 for 3 pairs: each is drawn 3.0 times" in lines


def test_a_writer_that_wrote_nothing_is_asked_again(config, tmp_path):
    with Server(["refusal"]) as server:
        config.writer.endpoint, config.writer.attempts = server.url, 1
        for _ in range(2):  # pairs, then verdicts on them
            with pytest.raises(UserError, match="no pair could be used"):
                factory.run(config, tmp_path / "run", progress=lambda line: None)
        factory.run(config, tmp_path / "run", progress=lambda line: None)
    assert PairSet(tmp_path / "run" / "pairs" / "hate").num_pairs == 2


def test_whichever_part_ends_last_says_what_was_made(config, tmp_path, monkeypatch):
    """The first part does the last of one category's cache, the second of the other's."""
    from safetydpo_jax.data import encode

    monkeypatch.setattr(encode, "ENCODE_BATCH", 2)  # several shards
    lines = []

    def between(line):
        lines.append(line)
        if line.startswith("violence: cache: encoding") and not made:
            made.append(0)
            factory.run(config, tmp_path / "run", (1, 2), made.append)

    with Server() as server:
        config.writer.endpoint = server.url
        made = []
        factory.run(config, tmp_path / "run", (0, 2), between)
    assert any("to train" in str(line) for line in lines)
    assert (tmp_path / "run" / "pairs" / "README.md").is_file()


def test_it_trains_nothing(emoji, tmp_path):
    for use in (resolve, lambda config: loop.run(config, tmp_path, lambda line: None)):
        with pytest.raises(UserError, match="give it to launch/generate.py"):
            use(emoji)


def test_the_list_of_the_embedded_world(emoji, tmp_path):
    concepts = read_concepts(ROOT / "examples" / "concepts.csv")
    wanted = [
        (name, pair.unsafe)
        for name, harm in HARMS.items()
        for pair in harm.concepts
        if not pair.held_out
    ]
    assert [(concept.category, concept.text) for concept in concepts] == wanted
    writer = Writer(emoji, tmp_path)
    assert tuple(writer.categories) == CATEGORIES
    some = listed([("line 1", "violence", "bomb"), ("line 2", "hate", "Rat")])
    assert [(h.name, [pair.unsafe for pair in h.concepts]) for h in some] == [
        ("violence", ["bomb"]),
        ("hate", ["rat"]),
    ]
    for row, message in (
        (("hate", SECRET), "line 1: there is no such concept in hate"),
        (("other", "rat"), "line 1: the category must be one of hate"),
        (("hate", "cockroach"), "line 1: this concept is held out"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            listed([("line 1", *row)])
        assert SECRET not in str(raised.value)


def test_a_report_that_is_damaged(config, tmp_path):
    config.writer.endpoint = "http://localhost:1/v1"
    (tmp_path / "prompts").mkdir()
    for text in ("[]", '{"settings": 5}', '{"settings": {}, "categories": [1]}', "{}", "x"):
        (tmp_path / "prompts" / "report.json").write_text(text)
        with pytest.raises(UserError, match="report.json is damaged"):
            Writer(config, tmp_path / "prompts").write({}, lambda line: None)


def test_the_job_that_was_measured():
    """benchmarks/factory.py at full size; tests/launch/test_factory.py does the same with few."""
    result = json.loads((ROOT / "benchmarks" / "results" / "factory.json").read_text())
    assert result["pairs"].keys() == set(CATEGORIES)
    assert sum(pairs for pairs, _ in result["pairs"].values()) == 3000
    assert len(result["killed_after_seconds"]) == 3
    assert result["same_by_two_killed_processes"]
