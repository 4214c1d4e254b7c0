"""Attention on TPUs: JAX's Pallas kernel, splash attention, that keeps no probabilities."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from safetydpo_jax import sharding

TILES = (512, 256, 128)  # of tokens; one of them must divide their number
WIDEST = 256  # head, in features: an autoencoder has one of 512
KEYS_FORWARD = 1024  # at a time, at the most, of heads up to 128 in bfloat16
# Whose gradients are in the chip's fast memory at a time. Where these are all keys, those of the
# queries are summed there, too; else they are written in parts, and read again to be summed.
KEYS_BACKWARD = 4096

Queries = Float[Array, "b t h d"]
Keys = Float[Array, "b s h d"]  # and values


def takes(tokens: int, width: int) -> bool:
    """Whether so many tokens can be split into tiles, and heads fit a chip's fast memory."""
    return tokens % TILES[-1] == 0 and width <= WIDEST


def splash(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / sqrt(d)) v, over a mesh each device for its own rows and heads.

    The compiler could not split it by itself.

    Args:
      q: queries (b, t, h, d).
      k: keys (b, s, h, d).
      v: values (b, s, h, d).
    """
    if (mesh := shared_mesh()) is None:
        return _local(q, k, v)
    rows = sharding.BATCH if q.shape[0] % sharding.num_batch_shards(mesh) == 0 else None
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    split = PartitionSpec(rows, None, heads)
    return jax.shard_map(_local, in_specs=(split, split, split), out_specs=split, check_vma=False)(
        q, k, v
    )


def shared_mesh() -> Any:
    """The mesh over whose devices rows are spread, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    # In a shard_map each device has rows of its own.
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


@jax.custom_vjp
def _local(q: Queries, k: Keys, v: Keys) -> Queries:
    """One device's part of it. Not by `_forward`: without a gradient the kernel keeps nothing."""
    with _precision(q):
        return _kernel(q, k, v)


def _forward(q: Queries, k: Keys, v: Keys) -> tuple[Queries, Callable[..., Any]]:
    with _precision(q):
        return jax.vjp(_kernel, q, k, v)


def _backward(pull_back: Callable[..., Any], dy: Queries) -> tuple[Queries, Keys, Keys]:
    with _precision(dy):
        return pull_back(dy)


_local.defvjp(_forward, _backward)


def _precision(x: Queries) -> contextlib.AbstractContextManager[None]:
    """A kernel's products have the precision asked of JAX; bfloat16's cannot have float32's."""
    half = x.dtype == jnp.bfloat16
    return jax.default_matmul_precision("bfloat16") if half else contextlib.nullcontext()


def _kernel(q: Queries, k: Keys, v: Keys) -> Queries:
    """Tokens lie along the lanes, which heads of 40, 64 or 80 would leave half empty.

    And it is how the projections' products come out, so that nothing has to be turned round.
    """
    # Here, as it takes 0.8 s, and few have a TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        FullMask,
        MultiHeadMask,
        QKVLayout,
        make_splash_mha,
    )

    rows, tokens, heads, width = q.shape
    keys = k.shape[1]
    tile_q, tile_k = (next(n for n in TILES if count % n == 0) for count in (tokens, keys))
    layout = QKVLayout.SEQ_MINOR
    # Wider heads and types take more of the fast memory.
    more = -(-width // TILES[-1]) * q.dtype.itemsize // 2
    sizes = BlockSizes(
        block_q=tile_q,
        block_kv=(forward := _largest(keys, KEYS_FORWARD // more, tile_k)),
        block_kv_compute=forward,
        block_q_dkv=tile_q,
        block_kv_dkv=_largest(keys, KEYS_BACKWARD // more, tile_k),
        block_kv_dkv_compute=tile_k,
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    mask = MultiHeadMask([FullMask((tokens, keys))] * (rows * heads))
    kernel: Any = make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    scaled = q * jnp.asarray(width**-0.5, q.dtype)  # the kernel knows no scale
    # Nor does it know rows: they are further heads to it.
    y = kernel(*(x.swapaxes(1, 2).reshape(rows * heads, -1, width) for x in (scaled, k, v)))
    return y.reshape(rows, heads, tokens, width).swapaxes(1, 2)


def _largest(count: int, most: int, tile: int) -> int:
    """The largest divisor of `count` of at most `most`, or one tile, that is tiles."""
    sizes = range(max(tile, min(count, most) // tile * tile), 0, -tile)
    return next(n for n in sizes if count % n == 0)
