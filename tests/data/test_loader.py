import itertools

import jax
import numpy as np
import pytest

from safetydpo_jax.data import STRATEGIES, batches, make_cache
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.conditioning import Conditioning


@pytest.fixture
def stored(config, pipeline, write, silent, tmp_path):
    write()
    return make_cache(config, pipeline, tmp_path / "run", silent)


def take(stored, config, count, start=0):
    return list(itertools.islice(batches(stored, config, start), count))


def visits(taken, part=None):
    taken = [batch[part] if part else batch for batch in taken]
    rows = np.concatenate([b["row_id"] for b in taken])
    return rows.tolist(), np.concatenate([b["draw"] for b in taken]).tolist()


def test_shapes_and_types(stored, config):
    config.accumulation = 2
    (batch,) = take(stored, config, 1)
    f32, u32 = "float32", "uint32"
    moments = {"mean": (f32, 4, 4, 3), "logvar": (f32, 4, 4, 3)}
    row = {"conditioning": Conditioning((f32, 5, 6)), "row_id": (u32,), "draw": (u32,)}
    assert jax.tree.map(lambda x: (x.dtype.name, *x.shape[1:]), batch) == {
        "winner": moments,
        "loser": moments,
        "winner_conditioning": row["conditioning"],
        **row,
        "preserve": moments | row | {"harm": row["conditioning"]},
    }
    assert len(batch["row_id"]) == 8
    assert len(batch["preserve"]["row_id"]) == 6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_row_once_an_epoch(stored, config, strategy):
    config.rows = strategy
    num_rows = 5 * len(STRATEGIES[strategy])
    rows, draws = visits(take(stored, config, num_rows))  # four epochs in batches of four
    expected = {2 * pair + which for pair in range(5) for which in STRATEGIES[strategy]}
    orders = [tuple(rows[i : i + num_rows]) for i in range(0, len(rows), num_rows)]
    assert all(set(order) == expected for order in orders)
    assert len(set(orders)) > 1
    assert draws == [i // num_rows for i in range(len(rows))]
    rows, draws = visits(take(stored, config, 8), "preserve")
    assert sorted(rows[:8]) == list(range(10, 18))
    assert draws == [i // 8 for i in range(24)]


def test_order_depends_on_seed_and_step_only(stored, config):
    whole = take(stored, config, 9)
    for start in (1, 4, 8):
        assert jax.tree.all(
            jax.tree.map(np.array_equal, whole[start:], take(stored, config, 9 - start, start))
        )
    far = take(stored, config, 1, 1_000_000)[0]
    assert set(far["draw"]) == {400_000}
    config.seed = 8
    assert visits(take(stored, config, 9)) != visits(whole)


@pytest.mark.parametrize(
    "hosts", [([0], [1]), ([0], [1], [2], [3]), ([0, 1], [2, 3]), ([3, 0], [1, 2])]
)
def test_shards_of_a_batch_are_all_of_it(stored, config, hosts):
    """Four hosts or two: together they see each row once an epoch, in the order of one."""
    count = sum(map(len, hosts))
    config.rows, config.preserve_batch_size = "both", 4
    whole = take(stored, config, 7)
    parts = [list(itertools.islice(batches(stored, config, 2, (own, count)), 5)) for own in hosts]

    def in_order(*of_hosts):
        shards = [shard for own, rows in zip(hosts, of_hosts, strict=True)
                  for shard in zip(own, np.split(rows, len(own)), strict=True)]  # fmt: skip
        return np.concatenate([rows for _, rows in sorted(shards, key=lambda shard: shard[0])])

    for step, batch in enumerate(whole[2:]):
        together = jax.tree.map(in_order, *(part[step] for part in parts))
        assert jax.tree.all(jax.tree.map(np.array_equal, batch, together))
    rows = visits(take(stored, config, 5))[0]
    assert sorted(rows[:10]) == list(range(10))


@pytest.mark.parametrize("shards", [([0], 3), ([2], 2), ([-1], 2)])
def test_shards_that_cannot_be(stored, config, shards):
    with pytest.raises(UserError, match="shards .* which must be a multiple of the shards"):
        batches(stored, config, 0, shards)


def test_a_batch_from_disk_is_that_from_memory(stored, config, monkeypatch):
    from safetydpo_jax.data import Cache, cache

    config.rows = "both"
    held = take(stored, config, 4)
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    on_disk = take(Cache(stored.folder), config, 4)
    assert jax.tree.all(jax.tree.map(np.array_equal, held, on_disk))


def test_accumulation_sees_the_rows_of_a_large_batch(stored, config):
    one = take(stored, config, 3)
    config.batch_size, config.accumulation, config.preserve_batch_size = 2, 2, 3
    assert visits(take(stored, config, 3)) == visits(one)


def test_rows_hold_their_own_pictures_and_prompt(stored, config):
    config.rows = "both"
    for batch in take(stored, config, 5):
        pairs, which = batch["row_id"].astype(int) // 2, batch["row_id"].astype(int) % 2
        (loser, _), (winner, safe) = stored.read(pairs), stored.read(5 + pairs)
        _, own = stored.read(5 * which + pairs)
        assert jax.tree.all(
            jax.tree.map(
                np.array_equal,
                [batch[key] for key in ("loser", "winner", "conditioning", "winner_conditioning")],
                [loser, winner, own, safe],
            )
        )
        rows = batch["preserve"]["row_id"].astype(int)
        moments, told = stored.read(rows - 5)
        np.testing.assert_array_equal(batch["preserve"]["mean"], moments["mean"])
        np.testing.assert_array_equal(
            batch["preserve"]["conditioning"].prompt_embeds, told.prompt_embeds
        )
        pairs = (rows + batch["preserve"]["draw"].astype(int)) % 5
        (_, unsafe), (_, safe) = stored.read(pairs), stored.read(5 + pairs)
        np.testing.assert_array_equal(
            batch["preserve"]["harm"].prompt_embeds, unsafe.prompt_embeds - safe.prompt_embeds
        )


def test_both_pictures_are_mirrored_every_other_visit(config, pipeline, write, silent, tmp_path):
    write()
    config.cache.flip = True
    stored = make_cache(config, pipeline, tmp_path / "run", silent)
    seen = {}
    for batch in take(stored, config, 10):
        for i, (row, draw) in enumerate(zip(batch["row_id"], batch["draw"], strict=True)):
            pair, one = np.array([row // 2], int), np.array([1])
            sides = [
                np.array_equal(batch[side]["mean"][i], stored.read(at, one)[0]["mean"][0])
                for side, at in (("loser", pair), ("winner", 5 + pair))
            ]
            assert sides[0] == sides[1]
            seen[int(row), int(draw)] = sides[0]
    assert all(seen[row, 0] != seen[row, 1] for row in range(10))
    assert sum(seen[row, 0] for row in range(10)) == 5


def test_batches_larger_than_the_data(stored, config):
    config.batch_size = 25
    rows, draws = visits(take(stored, config, 1))
    assert draws == [0] * 10 + [1] * 10 + [2] * 5
    assert set(rows) == set(range(10))


def test_no_preservation(stored, config):
    config.preserve_batch_size = 0
    assert "preserve" not in take(stored, config, 1)[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", "all", "config.rows is 'all': it must be one of unsafe_prompt, safe_prompt, both"),
        ("batch_size", 0, "config.batch_size is 0: it must be 1 or more"),
        ("accumulation", -2, "config.accumulation is -2: it must be 1 or more"),
        ("preserve_batch_size", -1, "config.preserve_batch_size is -1: it must be 0 or more"),
        ("seed", -1, "config.seed -1: both must be 0 or more"),
    ],
)
def test_values_that_cannot_be(stored, config, name, value, message):
    config[name] = value
    with pytest.raises(UserError, match=message):
        batches(stored, config)


def test_negative_step(stored, config):
    with pytest.raises(UserError, match="step -1"):
        batches(stored, config, -1)


def test_cache_without_pairs(stored, config):
    stored.num_pairs = 0
    with pytest.raises(UserError, match="holds no pairs"):
        batches(stored, config)
