"""Several pair sets read as one, and mixed by weights."""

import itertools
import shutil

import numpy as np
import pytest

from safetydpo_jax.data import PairSet, Picture, batches, make_cache, open_pairs, write_pairs
from safetydpo_jax.data.pairs import mixing_weights
from safetydpo_jax.errors import MissingFileError, UserError


@pytest.fixture
def sets(tmp_path):
    """Pair sets hate (3 pairs, 2 others), sexual (5), and all of those, in one folder."""
    rng = np.random.default_rng(0)

    def pictures(mark, count):
        pixels = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
        return [Picture(f"{mark}{i}", f"{mark} {i}", i, x) for i, x in enumerate(pixels)]

    folder = tmp_path / "pairs"
    for name, count, others in (("hate", 3, 2), ("sexual", 5, 0), ("all", 8, 0)):
        sides = pictures(f"{name}-u", count), pictures(f"{name}-s", count)
        write_pairs(folder / name, *sides, pictures(f"{name}-p", others), {})
    (folder / "validation").mkdir()
    return folder


def test_joined(sets):
    pairs = open_pairs(sets)
    assert (pairs.num_pairs, pairs.num_preserve) == (8, 2)
    assert pairs.parts == {"hate": 3, "sexual": 5}
    ids = {split: [p.id for p in pairs.pictures(split)] for split in pairs.sizes}
    assert ids["unsafe"] == [f"hate-u{i}" for i in range(3)] + [f"sexual-u{i}" for i in range(5)]
    assert ids["preserve"] == ["hate-p0", "hate-p1"]
    for which in (range(2, 5), range(3, 3), range(7, 8), range(0, 3)):
        found = [p.id for p in pairs.pictures("safe", which)]
        assert found == [ids["safe"][i] for i in which]
    assert pairs.card["settings"]["category"] == "hate, sexual"


def test_an_import_without_categories_is_its_set_of_all(sets):
    for name in ("hate", "sexual"):
        shutil.rmtree(sets / name)
    assert isinstance(pairs := open_pairs(sets), PairSet)
    assert pairs.num_pairs == 8


def test_one_set_is_itself(sets):
    assert isinstance(open_pairs(sets / "hate"), PairSet)
    with pytest.raises(MissingFileError, match="has no card.json"):
        open_pairs(sets / "validation")


def test_its_hash_is_of_all_of_them(sets):
    before = open_pairs(sets).card["content_hash"]
    (sets / "hate").rename(sets / "violence")
    assert open_pairs(sets).card["content_hash"] != before


@pytest.fixture
def cache(sets, config, pipeline, tmp_path):
    config.pairs.path = str(sets)
    return make_cache(config, pipeline, tmp_path / "run", lambda line: None)


def rows_of(cache, config, count, start=0):
    taken = itertools.islice(batches(cache, config, start), count)
    return [(batch["row_id"].astype(int), batch["draw"].astype(int)) for batch in taken]


def test_unmixed_each_row_comes_once(cache, config):
    rows = np.concatenate([rows for rows, _ in rows_of(cache, config, 4)])
    assert sorted(rows) == list(range(16))


def test_mixed_by_weights(cache, config):
    config.mix = ("hate=3",)
    taken = rows_of(cache, config, 100)
    rows, draws = (np.concatenate(x) for x in zip(*taken, strict=True))
    from_hate = rows < 6
    assert from_hate.mean() == 0.75
    for of_set, size in ((from_hate, 6), (~from_hate, 10)):
        epochs = [rows[of_set][i : i + size] for i in range(0, of_set.sum() - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert np.array_equal(draws[of_set], np.arange(of_set.sum()) // size)
    again = rows_of(cache, config, 40, start=60)
    assert all(np.array_equal(x[0], y[0]) for x, y in zip(taken[60:], again, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("violence=2",), "no set 'violence': it has hate, sexual"),
        (("hate",), "config.mix has 'hate': write a number above 0, as in 'hate=2'"),
        (("hate=-1",), "write a number above 0"),
        (("hate=nan",), "write a number above 0"),
        (("hate=inf",), "write a number above 0"),
    ],
)
def test_weights_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        mixing_weights({"hate": 3, "sexual": 5}, given)


def test_one_set_cannot_be_mixed(config, pipeline, sets, tmp_path):
    config.pairs.path = str(sets / "hate")
    cache = make_cache(config, pipeline, tmp_path / "run", lambda line: None)
    config.mix = ("hate=2",)
    with pytest.raises(UserError, match="no set 'hate': it is one set"):
        batches(cache, config)
