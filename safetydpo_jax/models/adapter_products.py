"""An adapter's float32 products with bfloat16 activations, as exact and six times cheaper on TPUs.

Their matrix units multiply bfloat16. XLA makes a float32 product of six: each operand is split into
three of 8 bits each, and of their nine products the three smallest are left out. But an adapter is
so narrow that nearly all of a unit stays idle, and what is bfloat16 already has no second and third
part: so the parts go side by side through one product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def down(x: Float[Array, "*batch c"], a: Float[Array, "c r"]) -> Float[Array, "*batch r"]:
    """x in bfloat16 times `a` in float32; float32."""
    return _summed(_product(x, _beside(a)))


def _down_forward(x: Array, a: Array) -> tuple[Array, tuple[Array, Array]]:
    return down(x, a), (x, a)


def _down_backward(kept: tuple[Array, Array], dh: Array) -> tuple[Array, Array]:
    x, a = kept
    dx = _product(*_narrow(dh, a.T)).astype(x.dtype)
    return dx, _summed(_over_rows(x, _beside(dh)))


down.defvjp(_down_forward, _down_backward)


@jax.custom_vjp
def up(h: Float[Array, "*batch r"], b: Float[Array, "r n"]) -> Float[Array, "*batch n"]:
    """h times `b`, both in float32; rounded to bfloat16, which is what its gradient comes in."""
    return _product(*_narrow(h, b)).astype(jnp.bfloat16)


def _up_forward(h: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return up(h, b), (h, b)


def _up_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    h, b = kept
    dh = _summed(_product(dy, _beside(b.T)))
    return dh, _summed(_over_rows(dy, _beside(h))).T


up.defvjp(_up_forward, _up_backward)


def _parts(x: Array) -> tuple[Array, Array, Array]:
    """Three in bfloat16, the larger first, whose sum is x but for its last bit."""
    # By what the compiler must keep: of a type's rounding, undone at once, it may think nothing.
    high = jax.lax.reduce_precision(x, 8, 7)
    middle = jax.lax.reduce_precision(x - high, 8, 7)
    high, middle, low = (y.astype(jnp.bfloat16) for y in (high, middle, x - high - middle))
    return high, middle, low


def _beside(x: Array) -> Array:
    return jnp.concatenate(_parts(x), -1)


def _narrow(h: Array, w: Array) -> tuple[Array, Array]:
    """Operands whose product is that of h (*batch, r) and w (r, n), without the smallest parts."""
    (h1, h2, h3), (w1, w2, w3) = _parts(h), _parts(w)
    return jnp.concatenate([h1, h1, h1, h2, h2, h3], -1), jnp.concatenate([w1, w2, w3, w1, w2, w1])


def _product(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _over_rows(x: Array, y: Array) -> Array:
    """x^T y, (c, n), over all axes but the last."""
    axes = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(
        x,
        y,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _summed(x: Array) -> Array:
    """The three parts side by side in the last axis, the smallest first."""
    high, middle, low = jnp.split(x, 3, -1)
    return high + (middle + low)
