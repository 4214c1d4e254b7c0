"""Second moments of what the layers get to see, added up while prompts are drawn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.experts import Experts
from safetydpo_jax.merge.layer import Inputs

SAFE = "safe"  # as a prompt's category: it has no vote, and nothing is to change under it
# Of one layer, as in `Inputs`: harmful and harmless (in, in), images (experts, in, rank).
Moments = tuple[Any, Any, Any]
Shares = Mapping[str, Any]


def shares(categories: Sequence[str], experts: Experts) -> dict[str, np.ndarray]:
    """What each prompt counts, float32; there are some of all, see `check_categories`.

    Returns:
      harmful, harmless, empty: (n, 1); own: (n, experts), 0 under prompts of other categories.
    """
    found, names = np.array(categories), list(dict.fromkeys(experts.names))
    of = {name: (found == name) / (found == name).sum() for name in [*names, SAFE]}
    columns = {
        "harmful": sum(of[name] for name in names),
        "harmless": of[SAFE],
        "empty": np.full(len(found), 1 / len(found)),
    }
    return {
        **{name: np.asarray(column, np.float32)[:, None] for name, column in columns.items()},
        "own": np.stack([of[name] for name in experts.names], 1).astype(np.float32),
    }


def voting(categories: Sequence[str]) -> list[str]:
    """The names of the categories whose prompts vote: all but the safe one."""
    return sorted(set(categories) - {SAFE})


def check_categories(categories: Sequence[str], experts: Experts, *, safe: bool = True) -> None:
    """Raises UserError unless every expert's category, and "safe" if it counts, has prompts."""
    wanted = [*experts.names, *([SAFE] if safe else [])]
    if missing := [name for name in wanted if name not in categories]:
        raise UserError(
            f"no prompts of {', '.join(missing)}: what experts do is wanted under prompts of each "
            "one's category, which is its name"
            + (f", and under safe ones (category {SAFE})" if safe else "")
        )


def check_layers(experts: Experts) -> None:
    """Raises UserError for a convolution, whose inputs are too many to keep."""
    for layer, (_, (*sides, _, _)) in experts.places.items():
        if math.prod(sides) > 1:  # a 1x1 convolution is a linear layer
            raise UserError(
                f"{layer} is a convolution, which sees too much to keep: this method merges experts"
                " on linear layers alone"
            )


def nothing(stacked: Mapping[str, tuple[Any, Any]]) -> dict[str, Moments]:
    """Zeros to add to.

    Args:
      stacked: by layer, all experts' factors: (experts, in, rank) and (experts, rank, out); of
        convolutions the kernel's sides come before `in`.
    """
    found = {}
    for layer, (a, _) in stacked.items():
        count, *_, wide, rank = a.shape
        zeros = np.zeros((wide, wide), np.float32)
        found[layer] = zeros, zeros, np.zeros((count, wide, rank), np.float32)
    return found


def added(
    moments: Moments,
    x: Float[Array, "b *tokens i"],
    inner: Float[Array, "b e t r"],
    shares: Shares,
) -> Moments:
    """With a batch's inputs x, of which the experts' first factors made `inner`."""
    harmful, harmless, images = moments
    return (
        harmful + _moment(x, shares["harmful"]),
        harmless + _moment(x, shares["harmless"]),
        images
        + jnp.einsum("bti,betr,be->eir", _tokens(x), inner, shares["own"], precision="highest"),
    )


def added_empty(moments: Moments, x: Float[Array, "b *tokens i"], shares: Shares) -> Moments:
    """With a batch's inputs under the empty prompt, which is harmless."""
    harmful, harmless, images = moments
    return harmful, harmless + _moment(x, shares["empty"]), images


def inputs(moments: Mapping[str, Moments], experts: Experts) -> dict[str, Inputs]:
    """What was added up, without the zeros to which ranks were filled up."""
    return {
        layer: Inputs(
            harmful,
            harmless,
            [
                image[:, : file.ranks[layer]] if layer in file.ranks else None
                for image, file in zip(images, experts.files, strict=True)
            ],
        )
        for layer, (harmful, harmless, images) in moments.items()
    }


def _tokens(x: Float[Array, "b *tokens i"]) -> Float[Array, "b t i"]:
    return x.reshape(len(x), -1, x.shape[-1])


def _moment(x: Float[Array, "b *tokens i"], shares: Float[Array, "b 1"]) -> Float[Array, "i i"]:
    """x^T x over all tokens, the rows of the batch weighted."""
    rows = (_tokens(x) * jnp.sqrt(shares)[:, None]).reshape(-1, x.shape[-1])
    # In full precision on every platform: the moments are to be inverted.
    return jnp.matmul(rows.T, rows, precision="highest")
