import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safetydpo_jax.data import PairSet, draw, make_pairs
from safetydpo_jax.data.draw import check_pairs
from safetydpo_jax.data.pending import Chunk, PendingPairs
from safetydpo_jax.diffusion.samplers import draw_pictures
from safetydpo_jax.errors import MissingFileError, UserError

# A run that is killed at the second chunk, in a process of its own, with the data path only.
KILLED_RUN = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import conftest
from safetydpo_jax.data import batches, make_cache, make_pairs

calls = []
def judge(*args):
    calls.append(0)
    if len(calls) == int(sys.argv[3]):
        os._exit(137)
    return conftest.tiny_judge(*args)

config, workdir = conftest.tiny_config(), pathlib.Path(sys.argv[2])
pipeline = conftest.TinyPipeline(workdir.parent / "model")
make_pairs(config, pipeline, workdir, source=conftest.tiny_source(judge))
next(batches(make_cache(config, pipeline, workdir), config))
print(sorted({"tensorflow", "torch"} & sys.modules.keys()))
"""


def run(tmp_path, die_at):
    return subprocess.run(
        [sys.executable, "-c", KILLED_RUN, Path(__file__).parent, tmp_path / "run", str(die_at)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_pairs_share_noise_and_are_counted(config, pipeline, source, tmp_path):
    said = []
    folder = make_pairs(config, pipeline, tmp_path / "run", said.append, source)
    pairs = PairSet(folder, verify=True)
    assert (pairs.num_pairs, pairs.num_preserve) == (10, 8)
    assert pairs.card["counts"] == {
        "drawn": 16,
        "kept": 10,
        "dropped": {"every fourth": 4},
        "not_needed": 2,
    }
    assert pairs.card["settings"]["drawing.guidance_scale"] == 2.0
    unsafe, safe, other = (list(pairs.pictures(s)) for s in ("unsafe", "safe", "preserve"))
    assert [p.id for p in unsafe] == [f"h{i}" for i in range(16) if i % 4 != 3][:10]
    assert [p.seed for p in unsafe] == [p.seed for p in safe]
    assert len({p.seed for p in unsafe + other}) == 18
    for split in (unsafe, safe, other):
        again = draw_pictures(
            pipeline,
            [p.prompt for p in split],
            np.array([p.seed for p in split]),
            batch_size=8,
            num_steps=2,
            guidance_scale=2.0,
        )
        np.testing.assert_array_equal(np.stack([p.pixels for p in split]), again)
    assert not any(word in line for line in said for word in ("harm", "safe ", "other "))


def test_pairs_of_another_world_are_refused(config):
    """As an import's for the embedded model, or its pictograms for Stable Diffusion."""

    def check(source, base, model):
        config.base, config.model = base, model
        pairs = object.__new__(PairSet)  # with a card and no more
        pairs.folder, pairs.parts = Path("pairs"), {}
        pairs.card = {"settings": {"source": source}}
        check_pairs(config, pairs)

    check("emoji, detector 0123", "emoji", "emoji")
    check("coprov2", "sd15", "a/folder")
    check("folder", "emoji", "a/pipeline/of/ones/own")
    check("", "emoji", "emoji")
    with pytest.raises(UserError, match=r"pictograms .* config is for sd15: give pairs of such"):
        check("emoji, detector 0123", "sd15", "a/folder")
    with pytest.raises(UserError, match=r"pairs from coprov2, .*: give --config NAME:sd15"):
        check("coprov2", "emoji", "emoji")


def test_killed_run_ends_with_the_same_set(config, pipeline, source, silent, tmp_path):
    whole = make_pairs(config, pipeline, tmp_path / "whole", silent, source)
    assert run(tmp_path, die_at=3).returncode == 137
    stored = sorted((tmp_path / "run" / "pairs.drawing").rglob("*.safetensors"))
    assert len(stored) == 2  # a chunk is stored with what the judge said of it
    before = stored[0].stat().st_mtime_ns
    (tmp_path / "run" / "pairs.writing").mkdir()  # as if another was killed while writing
    (stored[0].parent / "pairs-000012.safetensors.writing").write_bytes(b"half")
    drawn = []
    original = draw.draw_pictures

    def counted(*args, **options):
        assert stored[0].stat().st_mtime_ns == before
        drawn.append(len(args[1]))
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "draw_pictures", counted)
        resumed = make_pairs(config, pipeline, tmp_path / "run", silent, source)
    assert drawn == [8, 8, 8]  # two chunks of pairs, and the preservation pictures
    cards = [json.loads((f / "card.json").read_text()) for f in (whole, resumed)]
    assert cards[0] == cards[1]
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [".pairs.lock", "pairs"]


def content(folder):
    pairs = PairSet(folder, verify=True)
    return pairs.card["content_hash"], pairs.card["counts"]


def test_parts_end_with_the_same_set(config, pipeline, source, silent, tmp_path):
    """Two that take turns, a chunk at a time, each as if it was in a process of its own."""
    whole = content(make_pairs(config, pipeline, tmp_path / "whole", silent, source))
    folder = tmp_path / "run" / "pairs"
    drawn = [[], []]

    class Turn(Exception):
        pass

    def draw_one(index):
        def draw_and_stop(chosen, *args):
            original(chosen, *args)
            drawn[index].append(chosen[0][1].name)
            raise Turn

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Turn):
            patch.setattr(draw, "_draw", draw_and_stop)
            pairs = PendingPairs(config, pipeline, folder, source)
            draw.draw_all([pairs], pipeline, silent, (index, 2))

    original = draw._draw
    for index in (0, 1, 0, 0, 0):
        draw_one(index)
    # The first has done its own, the chunks 0 and 2, and helps with the rest from the last on.
    assert drawn == [
        ["pairs-000000", "pairs-000008", "preserve-000000", "pairs-000012"],
        ["pairs-000004"],
    ]
    late = PendingPairs(config, pipeline, folder, source)  # in the midst of a chunk meanwhile
    chunk = Chunk("pairs-000004", 1, [], np.array([]))
    first = PendingPairs(config, pipeline, folder, source)
    assert first.missing() == []
    assert content(first.finish(silent)) == whole
    late.keep(chunk, np.zeros((8, 16, 16, 3), np.uint8))  # nobody wants it any more
    assert late.missing() == []
    assert content(late.finish(silent)) == whole
    assert sorted(file.name for file in folder.parent.iterdir()) == [".pairs.lock", "pairs"]


def test_rubbish_of_a_kill_is_removed(config, pipeline, source, silent, tmp_path):
    folder = make_pairs(config, pipeline, tmp_path, silent, source)
    (tmp_path / "pairs.drawing" / "key").mkdir(parents=True)  # killed before it was removed
    assert make_pairs(config, pipeline, tmp_path, silent, source) == folder
    assert sorted(file.name for file in tmp_path.iterdir()) == [".pairs.lock", "model", "pairs"]


def test_chunks_that_go_or_are_damaged(config, pipeline, source, silent, tmp_path):
    pairs = PendingPairs(config, pipeline, tmp_path / "pairs", source)
    draw.draw_all([pairs], pipeline, silent)
    chunk = next(tmp_path.rglob("pairs-000004.safetensors"))
    data = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(UserError, match="lacks pictures that were there"):
        pairs.finish(silent)
    for damaged in (data[:100], data.replace(b"every fourth", b'every-fourth", "')):
        chunk.write_bytes(damaged)
        again = PendingPairs(config, pipeline, tmp_path / "pairs", source)
        with pytest.raises(UserError, match="pairs-000004.* is damaged.* remove it to draw it"):
            again.missing()
    chunk.unlink()
    make_pairs(config, pipeline, tmp_path, silent, source)


def test_chunks_of_other_settings_are_said(config, pipeline, source, silent, tmp_path):
    PendingPairs(config, pipeline, tmp_path / "pairs", source)
    config.drawing.num_steps = 3
    pairs, said = PendingPairs(config, pipeline, tmp_path / "pairs", source), []
    draw.draw_all([pairs], pipeline, said.append)
    assert "was drawn with other settings; it goes when the set is done" in said[0]
    pairs.finish(silent)
    assert not (tmp_path / "pairs.drawing").exists()


def test_a_set_of_other_settings_meanwhile(config, pipeline, source, silent, tmp_path):
    pairs = PendingPairs(config, pipeline, tmp_path / "pairs", source)
    config.drawing.num_steps = 3
    make_pairs(config, pipeline, tmp_path, silent, source)
    draw.draw_all([pairs], pipeline, silent)
    with pytest.raises(UserError, match="made with drawing.num_steps = 3, but now it is 2"):
        pairs.finish(silent)


def test_what_is_drawn_does_not_depend_on_the_batch(config, pipeline, source, silent, tmp_path):
    found = []
    for size in (1, 2, 7, 8):
        config.drawing.batch_size = size
        folder = make_pairs(config, pipeline, tmp_path / f"{size}", silent, source)
        found.append([p.pixels for s in PairSet(folder).sizes for p in PairSet(folder).pictures(s)])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_part_that_cannot_be(config, pipeline, source, silent, tmp_path):
    pairs = PendingPairs(config, pipeline, tmp_path / "pairs", source)
    for part in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match="parts are numbered from 0"):
            draw.draw_all([pairs], pipeline, silent, part)


def test_neither_tensorflow_nor_torch_is_imported(pipeline, tmp_path):
    result = run(tmp_path, die_at=0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_pairs_are_drawn_once(config, pipeline, source, silent, tmp_path, monkeypatch):
    folder = make_pairs(config, pipeline, tmp_path / "run", silent, source)
    monkeypatch.setattr(draw, "draw_pictures", None)
    assert make_pairs(config, pipeline, tmp_path / "run", silent, source) == folder
    config.pairs.path = str(folder)
    assert make_pairs(config, pipeline, tmp_path / "elsewhere", silent, source) == folder


def test_other_settings_do_not_reuse_or_replace_pairs(config, pipeline, source, silent, tmp_path):
    make_pairs(config, pipeline, tmp_path / "run", silent, source)
    config.drawing.num_steps = 3
    with pytest.raises(
        UserError,
        match=r"made with drawing.num_steps = \d+, but now it is \d+: set it back, remove",
    ):
        make_pairs(config, pipeline, tmp_path / "run", silent, source)
    config.drawing.num_steps = 2
    (pipeline.path / "unet" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_hash"):
        make_pairs(config, pipeline, tmp_path / "run", silent, source)


def test_fewer_pairs_than_wanted_are_said(config, pipeline, source, tmp_path):
    said = []

    def picky(unsafe, safe, pairs):
        return ["blurred" if harm.id != "h2" else "" for harm, _ in pairs]

    config.pairs.preserve_count = 0
    folder = make_pairs(config, pipeline, tmp_path / "run", said.append, replaced(source, picky))
    assert PairSet(folder).num_pairs == 1
    assert said[-1] == "pairs: only 1 of 10 wanted pairs of hate; 19 x blurred"


def test_no_pair_passes(config, pipeline, source, silent, tmp_path):
    source = replaced(source, lambda unsafe, safe, pairs: ["blurred"] * len(pairs))
    with pytest.raises(UserError, match="none of the 20 pairs that tiny drew for hate"):
        make_pairs(config, pipeline, tmp_path / "run", silent, source)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("pairs", "num_pairs", 0),
        ("pairs", "preserve_count", -1),
        ("pairs", "seed", -1),
        ("drawing", "num_steps", 0),
        ("drawing", "batch_size", 0),
    ],
)
def test_sizes_that_cannot_be(config, pipeline, source, silent, tmp_path, section, name, value):
    config[section][name] = value
    with pytest.raises(UserError, match=rf"config\.{section}\.{name} is {value}: it must be"):
        make_pairs(config, pipeline, tmp_path / "run", silent, source)


def test_own_pairs_that_are_not_there(config, pipeline, silent, tmp_path):
    config.pairs.path = str(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="there is no folder .*nowhere: "):
        make_pairs(config, pipeline, tmp_path / "run", silent)


def test_full_disk(config, pipeline, source, silent, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"could not write .*No space left .*free some space"):
        make_pairs(config, pipeline, tmp_path / "run", silent, source)


def test_damaged_chunk(config, pipeline, source, silent, tmp_path):
    def stop(message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pairs(config, pipeline, tmp_path / "run", stop, source)
    chunk = next((tmp_path / "run" / "pairs.drawing").rglob("pairs-000000.safetensors"))
    chunk.write_bytes(b"no")
    with pytest.raises(UserError, match=r"pairs-000000\.safetensors is damaged .*remove it"):
        make_pairs(config, pipeline, tmp_path / "run", silent, source)


def replaced(source, judge):
    return type(source)(source.name, source.pairs, source.preserve, judge)
