"""Batches in an order that is a pure function of the seed and the step.

A row is one (pair, prompt). Each epoch visits every row once, shuffled anew; batches run on across
the end of an epoch. Pair sets mixed by weights have epochs of their own. Whoever knows the step
knows the batch, so a checkpoint holds no loader state.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Float, Int

from safetydpo_jax.data.cache import Cache
from safetydpo_jax.data.pairs import mixing_weights
from safetydpo_jax.errors import UserError

# Strategy -> which prompts a pair is learnt under: 0 the unsafe one, 1 the safe one.
STRATEGIES = {"unsafe_prompt": (0,), "safe_prompt": (1,), "both": (0, 1)}

Batch = dict[str, Any]


def batches(
    cache: Cache,
    config: Any,
    start_step: int = 0,
    shards: tuple[Sequence[int], int] = ((0,), 1),
    reference: Float[np.ndarray, "rows draws 2"] | None = None,
) -> Iterator[Batch]:
    """Endless batches of NumPy arrays, one a step, in the types that the cache has stored.

    Args:
      cache: the moments and embeddings.
      config: `seed`; `rows`, one of `STRATEGIES`; `mix`, weights of joined pair sets as
        `pairs.mixing_weights` takes them; `batch_size` and `accumulation` (B is their
        product); `preserve_batch_size` (P is that times accumulation; 0 for none).
      start_step: the step of the first batch; the batch of a step does not depend on it.
      shards: which of each batch's shards are read, of how many: a batch is split into equal runs
        of rows, numbered from 0, and a process reads those of its devices.
      reference: the base's squared errors on winner and loser, by row_id and draw; a row's draws
        are then those, in turn, without end.

    Yields:
      winner, loser: {"mean", "logvar"} (B,h,w,c), moments of the scaled latents.
      conditioning: of the B rows' prompts; the null prompt's is `cache.null`.
      winner_conditioning: the safe prompts', whichever a row's own is.
      row_id: (B,) uint32, 2 * pair + (1 under the safe prompt), whatever the strategy.
      draw: (B,) uint32, how many times this row came before; with `reference`, modulo its draws.
      reference: (B, 2) float32, if there is such a table.
      preserve: if asked for, {"mean", "logvar" (P,h,w,c), "conditioning", "harm", "row_id" (P,),
        "draw" (P,)}: safe pictures under their prompts, those of the pairs and the others, in an
        order of their own. Their row_ids are no pair's. "harm" is the unsafe prompt's conditioning
        minus the safe one's, of some pair, and of the next pair with every draw.

    Raises:
      UserError: a value of the config that cannot be, or a damaged cache.
    """
    if config.rows not in STRATEGIES:
        raise UserError(
            f"config.rows is {config.rows!r}: it must be one of {', '.join(STRATEGIES)}"
        )
    for name, low in (("batch_size", 1), ("accumulation", 1), ("preserve_batch_size", 0)):
        if config[name] < low:
            raise UserError(f"config.{name} is {config[name]}: it must be {low} or more")
    if start_step < 0 or config.seed < 0:
        raise UserError(f"step {start_step}, config.seed {config.seed}: both must be 0 or more")
    own, count = shards
    for name in ("batch_size", "preserve_batch_size"):
        if not set(own) <= set(range(count)) or config[name] * config.accumulation % count:
            raise UserError(
                f"shards {[*own]} of {count} of a batch: config.{name} x accumulation is "
                f"{config[name] * config.accumulation}, which must be a multiple of the shards"
            )
    if cache.num_pairs < 1:
        raise UserError(f"{cache.folder} holds no pairs: draw some with config.pairs.num_pairs")

    pair_seed, preserve_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    parts, weights = [np.arange(cache.num_pairs)], [1.0]
    if config.mix:
        weights = mixing_weights(cache.parts, config.mix)
        ends = np.cumsum(list(cache.parts.values()))
        parts = np.split(np.arange(cache.num_pairs), ends[:-1])
    rows = [
        np.concatenate([2 * pairs + which for which in STRATEGIES[config.rows]]) for pairs in parts
    ]
    steps = _visits(rows, weights, config.batch_size * config.accumulation, pair_seed, shards)
    steps = steps.map(lambda visits: pair_batch(cache, visits[0], visits[1], reference))
    if size := config.preserve_batch_size * config.accumulation:
        # All safe pictures: records num_pairs and up; the pairs have the rows below 2 num_pairs.
        safe = 2 * cache.num_pairs + np.arange(cache.num_pairs + cache.num_preserve)
        preserve: Any = _visits([safe], [1.0], size, preserve_seed, shards)
        steps = steps.map_with_index(
            lambda step, batch: batch | {"preserve": _preserve_batch(cache, *preserve[step])}
        )
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(steps[start_step:].to_iter_dataset(reading))


def _visits(
    sets: Sequence[np.ndarray],
    weights: Sequence[float],
    size: int,
    seed: int,
    shards: tuple[Sequence[int], int],
) -> grain.MapDataset:
    """By step, the shards' share of ((size,) rows, (size,) how many times each came before)."""
    own = np.arange(size).reshape(shards[1], -1)[list(shards[0])].ravel()
    each = [_endless(rows, seed + i) for i, rows in enumerate(sets)]
    mixed = each[0] if len(each) == 1 else grain.MapDataset.mix(each, weights)
    return mixed.batch(size).map(lambda visits: tuple(x[own] for x in visits))


def _endless(rows: np.ndarray, seed: int) -> grain.MapDataset:
    """(row, how many times it came before), epoch after epoch."""
    return (
        grain.MapDataset.source(rows.tolist())
        .seed(seed)
        .shuffle()
        .repeat()
        .map_with_index(lambda index, row: (row, index // len(rows)))
    )


def pair_batch(
    cache: Cache,
    rows: Int[np.ndarray, "b"],
    draws: Int[np.ndarray, "b"],
    reference: Float[np.ndarray, "rows draws 2"] | None = None,
) -> Batch:
    """The rows of pairs as `batches` yields them."""
    known = {}
    if reference is not None:
        draws = draws % reference.shape[1]
        known = {"reference": reference[rows, draws]}
    pairs, which = rows // 2, rows % 2
    # Mirrored every other visit, both pictures alike: half of the pairs in every epoch.
    orientation = (pairs + which + draws) % cache.orientations
    loser, unsafe = cache.read(pairs, orientation)
    winner, safe = cache.read(cache.num_pairs + pairs, orientation)
    return {
        "winner": winner,
        "loser": loser,
        "conditioning": jax.tree.map(functools.partial(_chosen, which), unsafe, safe),
        "winner_conditioning": safe,
        "row_id": rows.astype(np.uint32),
        "draw": draws.astype(np.uint32),
        **known,
    }


def _chosen(which: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(which.reshape(-1, *[1] * (first.ndim - 1)) == 0, first, second)


def _preserve_batch(cache: Cache, rows: np.ndarray, draws: np.ndarray) -> Batch:
    records = rows - cache.num_pairs
    pairs = (rows + draws) % cache.num_pairs
    moments, conditioning = cache.read(records, (records + draws) % cache.orientations)
    (_, unsafe), (_, safe) = cache.read(pairs), cache.read(cache.num_pairs + pairs)
    return moments | {
        "conditioning": conditioning,
        "harm": jax.tree.map(lambda x, y: x.astype(np.float32) - y, unsafe, safe),
        "row_id": rows.astype(np.uint32),
        "draw": draws.astype(np.uint32),
    }
