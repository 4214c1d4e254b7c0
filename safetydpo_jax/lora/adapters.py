"""LoRA adapters: a nested dict beside the parameters, leaves `a` (in, rank) and `b` (rank, out).

A convolution's `a` is a convolution too, (kh, kw, in, rank), and `b` acts on its every pixel.
Source: Hu et al. 2021 (arXiv 2106.09685); initialised as peft's `init_lora_weights="gaussian"`.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Int, Key

from safetydpo_jax.errors import UserError

Adapters = dict[str, Any]


def kernels(unet_params: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Of every layer that can be adapted, by dotted path: where it is in the tree, kernel shape."""
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(unet_params))
    return {
        ".".join(path[:-1]): (path[:-1], tuple(leaf.shape))
        for path, leaf in flat.items()
        if path[-1] == "kernel"
    }


def module_paths(unet_params: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    r"""The dotted paths of the linear layers and convolutions that `targets` name, sorted.

    Args:
      unet_params: the UNet's parameters, or their shapes.
      targets: regular expressions. Each must match the end of a layer's dotted path, beginning at
        a dot: "to_q" takes every query projection, r"attn2\.to_k" those of the cross-attentions,
        r"ff\.net\.\d.*" the feed-forward layers, "conv1" a convolution of every residual block.

    Raises:
      UserError: a target is no regular expression, or matches no layer.
    """
    layers = kernels(unet_params)
    found: set[str] = set()
    for target in targets:
        try:
            pattern = re.compile(rf"(?:.*\.)?(?:{target})")
        except re.error as error:
            raise UserError(f"lora.targets: {target!r} is no regular expression: {error}") from None
        matches = {layer for layer in layers if pattern.fullmatch(layer)}
        if not matches:
            raise UserError(
                f"lora.targets: {target!r} matches no layer of the UNet; name linear layers or "
                "convolutions, as in 'to_q', 'to_k', 'to_v', 'to_out.0'"
            )
        found |= matches
    if not found:
        raise UserError("lora.targets is empty: name at least one layer to adapt, as in 'to_q'")
    return sorted(found)


def init_adapters(
    key: Key[Array, ""], unet_params: Mapping[str, Any], *, rank: int, targets: Sequence[str]
) -> Adapters:
    """New adapters that change nothing yet: a ~ N(0, 1/rank^2), b = 0, float32.

    Each layer draws from a key of its own name, so that its values do not depend on which other
    layers are adapted.

    Args:
      key: random key.
      unet_params: the UNet's parameters, or their shapes.
      rank: at least 1 and at most the smaller side of every adapted layer.
      targets: see `module_paths`.

    Raises:
      UserError: a target matches nothing, or the rank does not fit.
    """
    layers, adapters = kernels(unet_params), {}
    for path in module_paths(unet_params, targets):
        module, (*size, rows, columns) = layers[path]
        if not 1 <= rank <= min(rows, columns):
            raise UserError(
                f"lora.rank is {rank}, but {path} is {rows} x {columns}: "
                f"use a rank from 1 to {min(rows, columns)}"
            )
        layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.normal(layer_key, (*size, rows, rank), jnp.float32)
        adapters[(*module, "a")] = a / rank
        adapters[(*module, "b")] = jnp.zeros((rank, columns), jnp.float32)
    return traverse_util.unflatten_dict(adapters)


def scaled(adapters: Adapters, alpha: float, rank: int) -> Adapters:
    """The "lora" collection to apply: the same adapters with b multiplied by alpha / rank."""
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    return traverse_util.unflatten_dict(
        {path: x * (alpha / rank) if path[-1] == "b" else x for path, x in flat.items()}
    )


def routed(adapters: Adapters, expert: Int[Array | np.ndarray, "n"]) -> Adapters:
    """A "lora" collection with which each row of a batch is adapted by an expert of its own.

    The experts' factors stand side by side, as one adapter of rank experts * rank, and `gate`
    leaves of what lies between the two factors each row's own share. So all rows go through the
    same products, whichever expert is whose and however a mesh splits them; up to 128 wide,
    as of seven experts of rank 16, they cost a TPU no more than one expert's.

    Args:
      adapters: of several experts: leaves `a` (experts, ..., in, rank), `b` (experts, rank, out).
      expert: each row's, from 0; -1 is none.

    Returns:
      Leaves `a` (..., in, experts * rank), `b` (experts * rank, out), `gate` (n, experts * rank).
    """
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    found = {}
    for path, leaf in flat.items():
        if path[-1] == "a":
            experts, *_, rank = leaf.shape
            side_by_side = jnp.moveaxis(leaf, 0, -2)
            found[path] = side_by_side.reshape(*leaf.shape[1:-1], experts * rank)
            gate = jax.nn.one_hot(expert, experts, dtype=leaf.dtype)
            found[(*path[:-1], "gate")] = jnp.repeat(gate, rank, axis=1)
        else:
            found[path] = leaf.reshape(-1, leaf.shape[-1])
    return traverse_util.unflatten_dict(found)


def describe(adapters: Adapters) -> str:
    """Their ranks and how many layers they are on, as in "rank 16 on 40 layers"."""
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    ranks = sorted({leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "a"})
    words = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{words} on {len(flat) // 2} layers"


def count(adapters: Adapters) -> int:
    """How many numbers the adapters hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))
