"""Experts merged into one LoRA, layer by layer."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import scipy.linalg
from flax import traverse_util
from threadpoolctl import threadpool_limits

from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import Adapters
from safetydpo_jax.merge.experts import Experts
from safetydpo_jax.merge.factors import Cut, Factors, balanced, cut, cut_dense
from safetydpo_jax.merge.layer import Delta, Inputs, Method, Votes, Whitened
from safetydpo_jax.merge.methods import METHODS

T = TypeVar("T")
MOST_AT_ONCE = 8  # layers, whose matrices are in memory together

# What a method needs, in words.
ASKS = {
    "votes": "asks which expert is active where",
    "inputs": "asks what the layers get to see",
}


@dataclasses.dataclass(frozen=True)
class Merged:
    """One LoRA of several.

    Attributes:
      adapters: ready to apply.
      energy: of every layer, the share of the merged change's squared norm that its rank holds;
        where the cut is made on the layer's inputs, of the norm of its outputs there.
      error: of every layer, the most of it that another LoRA of that rank could hold beyond that.
      rank: that was asked for, or taken.
    """

    adapters: Adapters
    energy: dict[str, float]
    error: dict[str, float]
    rank: int


def merge(
    experts: Experts,
    method: str,
    *,
    rank: int | None = None,
    scale: float = 1.0,
    options: Mapping[str, Any] | None = None,
    votes: Mapping[str, Votes] | None = None,
    inputs: Mapping[str, Inputs] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Merges layer by layer, on each core another one.

    Args:
      experts: from `opened_experts`.
      method: one of `METHODS`.
      rank: of every layer of the result, at least 1; None is the highest of the experts', or the
        sum of theirs for a method that keeps it. A layer whose change has less keeps less.
      scale: what the result is multiplied by.
      options: the method's own, by name.
      votes: by layer, for methods that need them: `Statistics.votes`.
      inputs: by layer, for methods that need them: `Statistics.inputs`.
      seed: for methods that draw.
      progress: told after every layer how many are done, and of how many.

    Raises:
      UserError: no such method, option or rank; votes or inputs are missing; experts hold NaN.
    """
    chosen, options = check(method, options or {}, rank), dict(options or {})
    if chosen.needs and {"votes": votes, "inputs": inputs}[chosen.needs] is None:
        raise UserError(f"{method} {ASKS[chosen.needs]}: give statistics, or a model to make them")
    if rank is None:
        rank = experts.sum_of_ranks() if chosen.keeps_rank else experts.highest_rank

    def merged(name: str) -> Cut:
        layer = dataclasses.replace(
            experts.layer(name),
            votes=(votes or {}).get(name),
            inputs=(inputs or {}).get(name),
            seed=seed,
        )
        return cut_of(chosen.change(layer, **options), rank)

    flat, energy, error = {}, {}, {}
    for done, (name, found) in enumerate(by_layer(experts, merged), 1):
        (path, kernel), (a, b) = experts.places[name], found.factors
        flat[(*path, "a")] = a.reshape(*kernel[:-1], a.shape[-1])
        flat[(*path, "b")] = b * np.float32(scale) if scale != 1 else b
        energy[name], error[name] = found.energy, found.error
        progress(done, len(experts.places))
    return Merged(traverse_util.unflatten_dict(flat), energy, error, rank)


def by_layer(experts: Experts, work: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Every layer's name with what `work` makes of it, in order; on each core another layer."""
    workers = min(os.cpu_count() or 1, MOST_AT_ONCE)
    # Matrices this small gain little from more threads each, and nothing beside their neighbours'.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        yield from zip(experts.places, pool.map(work, experts.places), strict=True)


def check(method: str, options: Mapping[str, Any], rank: int | None = None) -> Method:
    """The method, if there is one of that name with such options; else UserError."""
    if method not in METHODS:
        raise UserError(f"the method is {method!r}: it must be one of {', '.join(METHODS)}")
    known = inspect.signature(METHODS[method].change).parameters
    for name, value in options.items():
        if name not in known or name == "layer":
            has = ", ".join(x for x in known if x != "layer") or "none"
            raise UserError(f"{method} has no option {name!r}; those it has: {has}")
        if name == "density" and not 0 < value <= 1:
            raise UserError(f"density is {value}: it must be above 0 and at most 1")
        if name in ("preservation", "ridge", "sharpness") and not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value}: it must be finite and at least 0")
    if rank is not None and rank < 1:
        raise UserError(f"the rank is {rank}: it must be at least 1")
    return METHODS[method]


def cut_of(change: Delta, rank: int) -> Cut:
    """The factors of at most `rank` nearest to what a method makes of a layer."""
    if isinstance(change, Whitened):
        found = cut(change.factors, rank)
        a = scipy.linalg.solve_triangular(
            change.root.T, found.factors.a, lower=False, check_finite=False
        )
        return found._replace(factors=balanced(Factors(a, found.factors.b)))
    return cut(change, rank) if isinstance(change, Factors) else cut_dense(change, rank)
