"""The feed-forward's activation, with a gradient that keeps nothing but its inputs."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def geglu(x: Float[Array, "*d"], gate: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """x times GELU of the gate (Shazeer 2020, arXiv 2002.05202) in PyTorch's form and float32."""
    return (_wide(x) * _wide(gate) * _normal_below(_wide(gate))).astype(x.dtype)


def _forward(x: Array, gate: Array) -> tuple[Array, tuple[Array, Array]]:
    return geglu(x, gate), (x, gate)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, gate = map(_wide, kept)
    below = _normal_below(gate)
    density = jnp.exp(-0.5 * jnp.square(gate)) / math.sqrt(2 * math.pi)
    dx = _wide(dy) * gate * below
    dgate = _wide(dy) * x * (below + gate * density)
    return dx.astype(kept[0].dtype), dgate.astype(kept[1].dtype)


geglu.defvjp(_forward, _backward)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _normal_below(x: Array) -> Array:
    """How much of the standard normal distribution lies below."""
    return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))
