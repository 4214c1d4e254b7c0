"""Batches in an order that is a pure function of the seed and the step.

A row is one (pair, prompt). Each epoch visits every row once, shuffled anew; batches run on across
the end of an epoch. Pair sets mixed by weights have epochs of their own. Whoever knows the step
knows the batch, so a checkpoint holds no loader state.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
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
# What the base answers on each draw of each row, known before: "errors" (rows, draws, 2), squared,
# on winner and loser; if there is an anchor "wanted" (rows, draws, 2, h, w, c), its outputs on them
# under the winner's prompt; if there are preserve rows "preserved" (those, draws, h, w, c). Rows
# are the strategy's, by row_id.
Reference = Mapping[str, Float[np.ndarray, "rows draws *answer"]]


def batches(
    cache: Cache,
    config: Any,
    start_step: int = 0,
    shards: tuple[Sequence[int], int] = ((0,), 1),
    reference: Reference | None = None,
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
      reference: what the base answers; a row's draws are then those, in turn, without end.

    Yields:
      winner, loser: {"mean", "logvar"} (B,h,w,c), moments of the scaled latents.
      conditioning: of the B rows' prompts; the null prompt's is `cache.null`.
      winner_conditioning: the safe prompts', whichever a row's own is.
      row_id: (B,) uint32, 2 * pair + (1 under the safe prompt), whatever the strategy.
      draw: (B,) uint32, how many times this row came before; with `reference`, modulo its draws.
      reference: if it is known, "errors" (B, 2), "wanted" (B, 2, h, w, c) and "preserved"
        (P, h, w, c), float32, or those of them that there are.
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
    rows = [_rows_of(pairs, config.rows) for pairs in parts]
    known = _Known(cache, config.rows, reference)
    steps = _visits(rows, weights, config.batch_size * config.accumulation, pair_seed, shards)
    steps = steps.map(lambda visits: known.pairs(*visits))
    if size := config.preserve_batch_size * config.accumulation:
        safe = preserve_rows(cache)
        preserve: Any = _visits([safe], [1.0], size, preserve_seed, shards)
        steps = steps.map_with_index(lambda step, batch: known.preserved(batch, *preserve[step]))
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
    own = np.arange(size).reshape(shards[1], -1)[list(shards[0])].ravel().tolist()
    each = [_endless(rows, seed + i) for i, rows in enumerate(sets)]
    mixed = each[0] if len(each) == 1 else grain.MapDataset.mix(each, weights)

    def share(step: int) -> tuple[np.ndarray, ...]:
        # Others' rows are not looked up: on a pod that would take longer than a step.
        return tuple(np.array(x) for x in zip(*(mixed[step * size + i] for i in own), strict=True))

    return grain.MapDataset.range(len(mixed) // size).map(share)


def _endless(rows: np.ndarray, seed: int) -> grain.MapDataset:
    """(row, how many times it came before), epoch after epoch."""
    return (
        grain.MapDataset.source(rows.tolist())
        .seed(seed)
        .shuffle()
        .repeat()
        .map_with_index(lambda index, row: (row, index // len(rows)))
    )


def pair_batch(cache: Cache, rows: Int[np.ndarray, "b"], draws: Int[np.ndarray, "b"]) -> Batch:
    """The rows of pairs as `batches` yields them."""
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
    }


def _chosen(which: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(which.reshape(-1, *[1] * (first.ndim - 1)) == 0, first, second)


def preserve_batch(cache: Cache, rows: Int[np.ndarray, "p"], draws: Int[np.ndarray, "p"]) -> Batch:
    """The preserve rows as `batches` yields them."""
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


def pair_rows(num_pairs: int, rows: str) -> Int[np.ndarray, "rows"]:
    """The row_ids of a strategy, in order."""
    return np.sort(_rows_of(np.arange(num_pairs), rows))


def _rows_of(pairs: np.ndarray, rows: str) -> np.ndarray:
    return np.concatenate([2 * pairs + which for which in STRATEGIES[rows]])


def preserve_rows(cache: Cache) -> Int[np.ndarray, "rows"]:
    """The row_ids of all safe pictures, in order; the pairs' are below 2 * num_pairs."""
    return 2 * cache.num_pairs + np.arange(cache.num_pairs + cache.num_preserve)


class _Known:
    """Reads batches with what the base answers on them, if that is known."""

    def __init__(self, cache: Cache, rows: str, reference: Reference | None):
        self._cache, self._tables = cache, dict(reference or {})
        self._preserved = self._tables.pop("preserved", None)
        self._rows = pair_rows(cache.num_pairs, rows)

    def pairs(self, rows: np.ndarray, draws: np.ndarray) -> Batch:
        if not self._tables:
            return pair_batch(self._cache, rows, draws)
        draws = draws % self._tables["errors"].shape[1]
        places = np.searchsorted(self._rows, rows)
        known = {name: table[places, draws] for name, table in self._tables.items()}
        return pair_batch(self._cache, rows, draws) | {"reference": known}

    def preserved(self, batch: Batch, rows: np.ndarray, draws: np.ndarray) -> Batch:
        """The batch of pairs with these preserve rows."""
        if self._preserved is None:
            return batch | {"preserve": preserve_batch(self._cache, rows, draws)}
        draws = draws % self._preserved.shape[1]
        known = {"preserved": self._preserved[rows - 2 * self._cache.num_pairs, draws]}
        return batch | {
            "preserve": preserve_batch(self._cache, rows, draws),
            "reference": batch["reference"] | known,
        }
