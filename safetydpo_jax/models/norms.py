"""Normalisation, written for what it costs: passes over memory.

Each reads its input twice, once for all its sums and once for the result, and so does each
gradient. Written plainly, with the mean before the variance, both take a pass more. They are jitted
by themselves, so that each is traced once for all layers of its shape, but inlined: of calls the
TPU compiler makes functions of their own, which it fuses with nothing around them.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from safetydpo_jax.models.parameter import parameter

SUBSET = 16  # one pixel in so many is asked for where, about, a channel lies


class GroupNorm(nn.Module):
    """Group normalisation over (h, w, c / groups), statistics in float32."""

    groups: int
    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        c = x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones_init(), (c,))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (c,))
        pixels = x.reshape(x.shape[0], -1, c)
        y: Array = _group_norm(pixels, scale, bias, self.groups, self.eps, self.dtype)
        return y.reshape(x.shape)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        scale = parameter(self, "scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = parameter(self, "bias", nn.initializers.zeros_init(), x.shape[-1:])
        return _layer_norm(x, scale, bias, self.eps, self.dtype)


def _full(x: Array) -> Array:
    return x.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(
    x: Float[Array, "b n c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    groups: int,
    eps: float,
    dtype: Any,
) -> Float[Array, "b n c"]:
    return _of_group_norm(x, scale, bias, groups, eps, dtype)[0]


def _group_norm_forward(
    x: Array, scale: Array, bias: Array, groups: int, eps: float, dtype: Any
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    y, means, rstd = _of_group_norm(x, scale, bias, groups, eps, dtype)
    return y, (x, scale, means, rstd)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
@jax.named_scope("group_norm")
def _of_group_norm(
    x: Float[Array, "b n c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    groups: int,
    eps: float,
    dtype: Any,
) -> tuple[Float[Array, "b n c"], Float[Array, "b c"], Float[Array, "b c"]]:
    """The result, each channel's group's mean, and one over its standard deviation.

    The sums are of x less some pixels' mean, whose square is at most `SUBSET` variances.

    The plain E[x^2] - E[x]^2 loses all digits where the mean is large, as in an autoencoder.
    """
    about = _full(x[:, : -(-x.shape[1] // SUBSET)]).mean(1, keepdims=True)
    off = _full(x) - about
    mean, square = off.mean(1), jnp.square(off).mean(1)  # of each channel
    center = about[:, 0] + mean
    means = _of_groups(center, groups)
    variance = _of_groups(square - jnp.square(mean) + jnp.square(center - means), groups)
    rstd = jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)
    gain = rstd * scale
    # One multiply and one add a channel.
    y = _full(x) * gain[:, None] + (bias - means * gain)[:, None]
    return y.astype(dtype), means, rstd


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
@jax.named_scope("group_norm")
def _group_norm_backward(
    groups: int, eps: float, dtype: Any, kept: tuple[Array, Array, Array, Array], dy: Array
) -> tuple[Array, Array, Array]:
    x, scale, means, rstd = kept
    total = _full(dy).sum(1)
    along = (_full(dy) * (_full(x) - means[:, None])).sum(1) * rstd  # with x normalised
    of_mean = _of_groups(total * scale, groups) / x.shape[1]
    of_norm = _of_groups(along * scale, groups) / x.shape[1]
    gain, pull = rstd * scale, jnp.square(rstd) * of_norm
    dx = _full(dy) * gain[:, None] - _full(x) * pull[:, None]
    dx = dx + (means * pull - rstd * of_mean)[:, None]
    return dx.astype(x.dtype), along.sum(0), total.sum(0)


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _of_groups(x: Float[Array, "b c"], groups: int) -> Float[Array, "b c"]:
    """The mean of each channel's group."""
    grouped = x.reshape(len(x), groups, -1)
    return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(
    x: Float[Array, "*batch c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    eps: float,
    dtype: Any,
) -> Float[Array, "*batch c"]:
    return _of_layer_norm(x, scale, bias, eps, dtype)[0]


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, eps: float, dtype: Any
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    y, mean, rstd = _of_layer_norm(x, scale, bias, eps, dtype)
    return y, (x, scale, mean, rstd)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
@jax.named_scope("layer_norm")
def _of_layer_norm(
    x: Float[Array, "*batch c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    eps: float,
    dtype: Any,
) -> tuple[Float[Array, "*batch c"], Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """The result, each token's mean, and one over its standard deviation.

    A token's features have no large mean, so that the plain form of the variance serves.
    """
    mean = _full(x).mean(-1, keepdims=True)
    variance = jnp.square(_full(x)).mean(-1, keepdims=True) - jnp.square(mean)
    rstd = jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)
    y = (_full(x) - mean) * rstd * scale + bias
    return y.astype(dtype), mean, rstd


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
@jax.named_scope("layer_norm")
def _layer_norm_backward(
    eps: float, dtype: Any, kept: tuple[Array, Array, Array, Array], dy: Array
) -> tuple[Array, Array, Array]:
    x, scale, mean, rstd = kept
    normal = (_full(x) - mean) * rstd
    scaled = _full(dy) * scale
    of_mean = scaled.mean(-1, keepdims=True)
    of_norm = (scaled * normal).mean(-1, keepdims=True)
    dx = (scaled - of_mean - normal * of_norm) * rstd
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (_full(dy) * normal).sum(rows), _full(dy).sum(rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
