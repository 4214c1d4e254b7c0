"""The one entry to attention: the kernel that a platform does best, and its own for the rest."""

import functools
import math
import os
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from safetydpo_jax import sharding
from safetydpo_jax.models.geglu import geglu
from safetydpo_jax.models.layers import Dense
from safetydpo_jax.models.norms import LayerNorm
from safetydpo_jax.models.parts import num_parts
from safetydpo_jax.models.target import target
from safetydpo_jax.models.tpu_attention import shared_mesh, splash, takes

LONG = 1024  # tokens from which on a platform's kernel is asked; below it logits are small
# Bytes at a time, of one CPU's rows.
LOGITS = 2**24  # in the plain form, which has some copies of them
WIDEST = 2**25  # the feed-forward's widest array, where memory is to be spared
# Times as many elsewhere, where a larger product is a faster one; and a TPU copies what it takes in
# turn.
ROOMIER = {"gpu": 4, "tpu": 16}

Queries = Float[Array, "b t h d"]
Keys = Float[Array, "b s h d"]  # and values
Heads = Float[Array, "b _ h _"]  # either, or one number of each


def dot_product_attention(q: Queries, k: Keys, v: Keys, *, causal: bool = False) -> Queries:
    """softmax(q k^T / sqrt(d)) v, with float32 logits and softmax.

    From `LONG` tokens on by Pallas's splash attention on a TPU, each device for its own rows and
    heads under the mesh of `jax.set_mesh`, and by cuDNN's on a GPU in half precision. All else is
    the plain form, which takes the heads in turn where their logits are many.

    Args:
      q: queries (b, t, h, d).
      k: keys (b, s, h, d).
      v: values (b, s, h, d).
      causal: a token attends to none after it (text encoders).
    """
    if causal:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    kernels: dict[str, Callable[..., Queries]] = {}
    if min(q.shape[1], k.shape[1]) >= LONG:
        if all(takes(x.shape[1], x.shape[3]) for x in (q, k)):
            kernels["tpu"] = splash
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        # Asked for where there is none, even as the branch not taken, it raises.
        if half and q.shape[-1] in range(8, 129, 8) and _has_cudnn_attention():
            kernels["cuda"] = functools.partial(
                jax.nn.dot_product_attention, implementation="cudnn"
            )
    return (
        jax.lax.platform_dependent(q, k, v, default=_plain, **kernels)
        if kernels
        else _plain(q, k, v)
    )


def _has_cudnn_attention() -> bool:
    """Of NVIDIA's GPUs those from Ampere on have it, unless SAFETYDPO_PLAIN_ATTENTION is set."""
    if target() != "gpu" or os.environ.get("SAFETYDPO_PLAIN_ATTENTION"):
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "8.9", AMD's "gfx942"
    return bool(re.fullmatch(r"\d+(\.\d+)?", capability)) and float(capability) >= 8


@jax.custom_vjp
def _plain(q: Queries, k: Keys, v: Keys) -> Queries:
    """By XLA; the gradient, as in flash attention, computes the probabilities again."""
    return _plain_attention(q, k, v)[0]


def _plain_forward(q: Queries, k: Keys, v: Keys) -> tuple[Queries, tuple[Heads, ...]]:
    y, lse = _plain_attention(q, k, v)
    return y, (q, k, v, y, lse)


def _plain_backward(kept: tuple[Heads, ...], dy: Queries) -> tuple[Heads, ...]:
    return _plain_attention_gradients(*kept, dy)


_plain.defvjp(_plain_forward, _plain_backward)


# Each is traced once for all layers of its shape; `plan.cost` knows them by their names.
@jax.jit
def _plain_attention(q: Queries, k: Keys, v: Keys) -> tuple[Array, ...]:
    return _in_parts(_attend, q, k, v)


@jax.jit
def _plain_attention_gradients(*kept: Heads) -> tuple[Array, ...]:
    return _in_parts(_gradients, *kept)


def _in_parts(f: Callable[..., tuple[Array, ...]], *arrays: Heads) -> tuple[Array, ...]:
    """f, whose first arguments are q and k, over as few heads at a time as `LOGITS` wants."""
    q, k, *_ = arrays
    rows, heads = q.shape[0], q.shape[2]
    size = 4 * rows * heads * q.shape[1] * k.shape[1]
    most, (shards, groups) = _on_all_devices(LOGITS), _split_over_devices(rows, heads)
    by_head = num_parts(heads // groups, size, most)
    by_row = num_parts(rows // shards, size // by_head, most)

    # A part has of every device some rows and heads, as these lie on the devices one after another:
    # rows in turn, and not so many at a time, or each device would be sent all and compute all.
    def split(x: Heads) -> Float[Array, "n r g _ _"]:
        x = x.reshape(rows // by_row, by_row, x.shape[1], heads // by_head, by_head, x.shape[3])
        x = x.transpose(1, 4, 0, 3, 2, 5)
        return x.reshape(by_row * by_head, *x.shape[2:])

    def join(x: Float[Array, "n r g _ _"]) -> Heads:
        x = x.reshape(by_row, by_head, *x.shape[1:]).transpose(2, 0, 4, 3, 1, 5)
        return x.reshape(rows, x.shape[2], heads, x.shape[5])

    parts = tuple(split(x) for x in arrays)
    if by_head * by_row == 1:
        return tuple(join(y[None]) for y in f(*(x[0] for x in parts)))
    return tuple(join(y) for y in jax.lax.map(lambda part: f(*part), parts))


def _by_tokens(
    f: Callable[..., tuple[Array, ...]], *arrays: Float[Array, "r h t _"], others: int
) -> tuple[Array, ...]:
    """f over so many tokens of its arguments at a time as `LOGITS` wants, against `others`."""
    rows, heads, tokens, _ = arrays[0].shape
    parts = num_parts(tokens, 4 * rows * heads * tokens * others, _on_all_devices(LOGITS))
    if parts == 1:
        return f(*arrays)

    def split(x: Float[Array, "r h t _"]) -> Float[Array, "n r h _ _"]:
        return jnp.moveaxis(x.reshape(rows, heads, parts, tokens // parts, -1), 2, 0)

    def join(x: Float[Array, "n r h _ _"]) -> Float[Array, "r h t _"]:
        return jnp.moveaxis(x, 0, 2).reshape(rows, heads, tokens, -1)

    found = jax.lax.map(lambda part: f(*part), tuple(split(x) for x in arrays))
    return tuple(join(x) for x in found)


def _split_over_devices(rows: int, heads: int) -> tuple[int, int]:
    """Over how many devices rows, and heads, are spread."""
    if (mesh := shared_mesh()) is None:
        return 1, 1
    shards, groups = sharding.num_batch_shards(mesh), mesh.shape["tensor"]
    return shards if rows % shards == 0 else 1, groups if heads % groups == 0 else 1


def _on_all_devices(most: int) -> int:
    """So many bytes, as a CPU has at a time, on all devices that share the rows."""
    mesh = shared_mesh()
    devices = 1 if mesh is None else sharding.num_batch_shards(mesh)
    return devices * most * ROOMIER.get(target(), 1)


def _attend(
    q: Float[Array, "r h t d"], k: Float[Array, "r h s d"], v: Float[Array, "r h s d"]
) -> tuple[Array, ...]:
    """The result (r, h, t, d), and the logarithm of each row's sum of exponentials (.., 1)."""

    def of_queries(q: Array) -> tuple[Array, Array]:
        logits = _product("rhtd,rhsd->rhts", q, k) / math.sqrt(q.shape[-1])
        most = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - most)
        total = weights.sum(-1, keepdims=True)
        y = _product("rhts,rhsd->rhtd", weights.astype(v.dtype), v) / total
        return y.astype(v.dtype), most + jnp.log(total)

    return _by_tokens(of_queries, q, others=k.shape[2])


def _gradients(
    q: Float[Array, "r h t d"],
    k: Float[Array, "r h s d"],
    v: Float[Array, "r h s d"],
    y: Float[Array, "r h t d"],
    lse: Float[Array, "r h t 1"],
    dy: Float[Array, "r h t d"],
) -> tuple[Array, ...]:
    """Of `_attend`, whose results were y and lse: with respect to q, k and v.

    A row of probabilities sums to one, which takes y dy off each of its derivatives. What is summed
    over queries is computed the other way round, from the keys: two products more, but XLA's CPU
    backend then makes one pass of each line, and on the whole takes two thirds of the time.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    mean = jnp.sum(y.astype(jnp.float32) * dy, -1, keepdims=True)

    def of_queries(q: Array, dy: Array, lse: Array, mean: Array) -> tuple[Array]:
        p = jnp.exp(_product("rhtd,rhsd->rhts", q, k) * scale - lse)
        dlogits = p * (_product("rhtd,rhsd->rhts", dy, v) - mean)
        dq = _product("rhts,rhsd->rhtd", dlogits.astype(k.dtype), k) * scale
        return (dq.astype(q.dtype),)

    def of_keys(k: Array, v: Array) -> tuple[Array, Array]:
        p = jnp.exp(_product("rhsd,rhtd->rhst", k, q) * scale - lse.swapaxes(2, 3))
        dlogits = p * (_product("rhsd,rhtd->rhst", v, dy) - mean.swapaxes(2, 3))
        dk = _product("rhst,rhtd->rhsd", dlogits.astype(q.dtype), q) * scale
        dv = _product("rhst,rhtd->rhsd", p.astype(dy.dtype), dy)
        return dk.astype(k.dtype), dv.astype(v.dtype)

    (dq,) = _by_tokens(of_queries, q, dy, lse, mean, others=k.shape[2])
    return dq, *_by_tokens(of_keys, k, v, others=q.shape[2])


def _product(how: str, x: Array, y: Array) -> Float[Array, "..."]:
    return jnp.einsum(how, x, y, preferred_element_type=jnp.float32)


class Attention(nn.Module):
    """diffusers' Attention: to_q, to_k, to_v, to_out.0; over `context` or, without it, over x."""

    features: int
    heads: int
    qkv_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"] | None = None
    ) -> Float[Array, "b t c"]:
        context = x if context is None else context

        def project(name: str, inputs: Float[Array, "b n d"]) -> Float[Array, "b n h e"]:
            y = Dense(self.features, self.qkv_bias, self.dtype, name=name)(inputs)
            return y.reshape(*y.shape[:2], self.heads, self.features // self.heads)

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        y = dot_product_attention(q, k, v).reshape(x.shape[0], x.shape[1], self.features)
        return Dense(self.features, dtype=self.dtype, name="to_out.0")(y)


class TransformerBlock(nn.Module):
    """diffusers' BasicTransformerBlock: self-attention, cross-attention, GEGLU feed-forward.

    `sparing`: of memory, as it is within a block that is computed again for the gradient.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    sparing: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b t c"]:
        c = x.shape[-1]
        h = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + Attention(c, self.heads, dtype=self.dtype, name="attn1")(h)
        h = LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = x + Attention(c, self.heads, dtype=self.dtype, name="attn2")(h, context)
        h = LayerNorm(dtype=self.dtype, name="norm3")(x)
        if not self.sparing:
            return x + FeedForward(self.dtype, name="ff")(h)
        # Eight times as wide as all else here: in parts it keeps the peak down.
        feed_forward = nn.remat(FeedForward)(self.dtype, name="ff")
        parts = num_parts(h.shape[1], 4 * 8 * h.size, _on_all_devices(WIDEST))
        return x + jnp.concatenate([feed_forward(part) for part in jnp.split(h, parts, 1)], 1)


class FeedForward(nn.Module):
    """diffusers' FeedForward with GEGLU, token by token."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        c = x.shape[-1]
        h, gate = Dense(8 * c, dtype=self.dtype, parts=2, name="net.0.proj")(x)
        return Dense(c, dtype=self.dtype, name="net.2")(geglu(h, gate))
