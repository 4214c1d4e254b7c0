"""3x3 convolutions of many channels as one matrix product, for CPUs.

Of small pictures XLA's own convolution reaches a tenth to a half of the product's speed, and its
gradient turns the kernel round in memory at every step. Measured in benchmarks/cpu_convolution.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# With fewer channels XLA's own is as fast; and the columns hold nine times the input.
LEAST_CHANNELS, MOST_BYTES = 640, 2**27
_SHIFTS = [(i, j) for i in range(3) for j in range(3)]


def pay(shape: Sequence[int], features: int) -> bool:
    """Whether pictures (b, h, w, c) and a kernel (3, 3, c, features) gain by it."""
    b, h, w, c = shape
    return min(c, features) >= LEAST_CHANNELS and 36 * b * h * w * c <= MOST_BYTES


@jax.custom_vjp
def conv3x3(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """A convolution with stride 1 and padding 1."""
    return (_columns(x) @ kernel.reshape(-1, kernel.shape[-1])).reshape(*x.shape[:3], -1)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv3x3(x, kernel), (x, kernel)


def _backward(kept: tuple[Array, Array], dy: Float[Array, "b h w o"]) -> tuple[Array, Array]:
    x, kernel = kept
    b, h, w, c = x.shape
    rows = dy.reshape(b * h * w, -1)
    # The kernel as it lies in memory: no transposed copy is made of it.
    dcolumns = jax.lax.dot_general(rows, kernel.reshape(9 * c, -1), (((1,), (1,)), ((), ())))
    dcolumns = dcolumns.reshape(b, h, w, 9, c)
    dx = jnp.zeros((b, h + 2, w + 2, c), x.dtype)
    for n, (i, j) in enumerate(_SHIFTS):
        dx = dx.at[:, i : i + h, j : j + w].add(dcolumns[:, :, :, n])
    return dx[:, 1:-1, 1:-1], (_columns(x).T @ rows).reshape(kernel.shape)


conv3x3.defvjp(_forward, _backward)


def _columns(x: Float[Array, "b h w c"]) -> Float[Array, "n c9"]:
    """Each pixel's neighbourhood as one row, (b h w, 9 c)."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [padded[:, i : i + h, j : j + w] for i, j in _SHIFTS]
    return jnp.concatenate(parts, -1).reshape(b * h * w, 9 * c)
