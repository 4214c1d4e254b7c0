"""3x3 convolutions with 16 multiplications to four pixels instead of 36, for CPUs.

Winograd's F(2x2, 3x3) of Lavin & Gray 2015 (arXiv 1509.09308): pictures are cut into tiles of 4 x 4
pixels that overlap by two, tiles and kernel are transformed by additions, and what is left are 16
matrix products. In float32 it is as exact as XLA's own convolution, which on a CPU reaches half to
all of the product's speed: with 2.25 times fewer products this one takes half its time or less.
Tiles of 6 x 6 would save more products, but lose a digit and a half, and gain little here. Measured
in benchmarks/cpu_convolution.py.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from safetydpo_jax.models import mixed
from safetydpo_jax.models.parts import num_parts

LEAST_TILES = 128  # with fewer, transforming the kernel costs more than is saved
LEAST_CHANNELS = 32  # with fewer, transforming the picture does
MOST_BYTES = 2**27  # at a time: of tiles, of products, of the transformed kernel
_MIRRORED = (3, 1, 2, 0)  # where a kernel's transformed parts are those of the kernel turned round

Picture = Float[Array, "_ _ _ _"]  # rows, height, width, channels
Kernel = Float[Array, "3 3 i o"]
Grid = list[list[Array]]  # 4 x 4 arrays
# One of JAX's own contexts, so that its caches tell the programs apart.
_kept = jax.make_user_context(False)


def kernels_kept(kept: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within it a program that uses a kernel more than once transforms it once.

    It keeps what it made of it, 16 / 9 of the kernel's size, from the first use to the last.
    """
    return _kept(kept)


def pay(shape: Sequence[int], features: int) -> bool:
    """Whether pictures (b, h, w, c) and a kernel (3, 3, c, features) gain by it."""
    b, h, w, c = shape
    tiles = b * h * w // 4
    return h % 2 == w % 2 == 0 and tiles >= LEAST_TILES and min(c, features) >= LEAST_CHANNELS


def conv3x3(
    x: Float[Array, "b h w i"], kernel: Kernel, *, half: bool = False
) -> Float[Array, "b h w o"]:
    """A convolution with stride 1 and padding 1, of even sides; in the type of x.

    Args:
      x: pictures.
      kernel: as of `lax.conv_general_dilated`.
      half: products have bfloat16 operands, and float32 sums; transforms are float32's in any case.
    """
    return _conv3x3(x, kernel, half)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3x3(x: Picture, kernel: Kernel, half: bool) -> Picture:
    return _convolve(x, kernel, half, turned=False)


def _forward(x: Any, kernel: Any, half: bool) -> tuple[Picture, tuple[Array | None, Array]]:
    """x is kept for the kernel's gradient alone."""
    y: Any = _conv3x3(x.value, kernel.value, half)
    return y, (x.value if kernel.perturbed else None, kernel.value)


def _backward(
    half: bool, kept: tuple[Array | None, Array], dy: Picture
) -> tuple[Picture, Kernel | None]:
    """dx is the convolution of dy with the kernel turned round."""
    x, kernel = kept
    dx = _convolve(dy, kernel, half, turned=True)
    return dx, None if x is None else _kernel_gradient(x, dy).astype(kernel.dtype)


_conv3x3.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnames=("half", "turned"))  # traced once for each shape
def _convolve(x: Picture, kernel: Kernel, half: bool, *, turned: bool) -> Picture:
    """With the kernel, or with it turned round: over some of its features at a time."""
    if not _kept.value:
        # With the picture, not before: XLA would transform all kernels at the start and keep them.
        x, kernel = lax.optimization_barrier((x, kernel))
    axis, order = (2, _MIRRORED) if turned else (3, range(4))
    features = kernel.shape[axis]
    count = num_parts(features, 64 * kernel.shape[2] * kernel.shape[3], MOST_BYTES)

    def of_some(part: Array | int) -> Picture:
        size = features // count
        some = lax.dynamic_slice_in_dim(kernel, part * size, size, axis)
        transformed = _of_kernel(some)

        def product(tiles: Array, i: int, j: int) -> Array:
            return _product(tiles, transformed[order[i]][order[j]], int(turned), half)

        return _in_strips(product, x, size)

    if count == 1:
        return of_some(0)
    parts = lax.map(of_some, jnp.arange(count))
    return jnp.moveaxis(parts, 0, 3).reshape(*x.shape[:3], features)


def _product(tiles: Array, kernel: Array, contract: int, half: bool) -> Array:
    if half:
        return mixed.product(tiles, kernel, (1, contract))
    return lax.dot_general(tiles, kernel, (((1,), (contract,)), ((), ())))


def _in_strips(product: Callable[[Array, int, int], Array], x: Picture, features: int) -> Picture:
    """The whole convolution, over as many rows of tiles at a time as `MOST_BYTES` wants."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def strip(padded: Picture) -> Picture:
        tiles = _of_picture(padded.astype(jnp.float32))
        products = [[product(tiles[i][j], i, j) for j in range(4)] for i in range(4)]
        return _to_picture(products, (b, padded.shape[1] // 2 - 1, w // 2)).astype(x.dtype)

    count = num_parts(h // 2, 16 * b * h * w * max(c, features), MOST_BYTES)
    if count == 1:
        return strip(padded)
    rows = h // count

    def write(i: Array, y: Picture) -> Picture:
        """Strip by strip into one picture: as a stack of strips all would be copied twice more."""
        part = lax.dynamic_slice_in_dim(padded, i * rows, rows + 2, 1)
        return lax.dynamic_update_slice_in_dim(y, strip(part), i * rows, 1)

    return lax.fori_loop(0, count, write, jnp.zeros((b, h, w, features), x.dtype))


def _of_picture(padded: Picture) -> Grid:
    """The transformed tiles, each array (tiles, c).

    In `lax`'s words, as the other transforms: NumPy's take a multiple of the time to trace.
    """

    def transform(x: Picture, axis: int) -> tuple[Picture, ...]:
        end = x.shape[axis] - 3
        a, b, c, d = (lax.slice_in_dim(x, k, k + end, 2, axis) for k in range(4))
        return lax.sub(a, c), lax.add(b, c), lax.sub(c, b), lax.sub(b, d)

    return [
        [lax.reshape(t, (t.size // t.shape[3], t.shape[3])) for t in transform(rows, 2)]
        for rows in transform(padded, 1)
    ]


def _of_kernel(kernel: Kernel) -> Grid:
    """The transformed kernel, each array (i, o)."""

    def transform(x: Array) -> tuple[Array, ...]:
        a, b, c = (lax.index_in_dim(x, k, 0, keepdims=False) for k in range(3))
        ends = lax.add(a, c)
        return a, lax.add(ends, b) / 2, lax.sub(ends, b) / 2, c

    return [list(transform(row)) for row in transform(kernel.astype(jnp.float32))]


def _to_picture(products: Grid, tiles: tuple[int, int, int]) -> Picture:
    """Two pixels each way of every tile, of `tiles`: pictures, rows, columns."""

    def transform(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
        return lax.add(lax.add(a, b), c), lax.sub(lax.sub(b, c), d)

    rows = zip(*(transform(*column) for column in zip(*products, strict=True)), strict=True)
    pixels = jnp.stack([jnp.stack(transform(*row), 1) for row in rows], 1)  # (tiles, 2, 2, o)
    b, h, w = tiles
    pixels = pixels.reshape(b, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(b, 2 * h, 2 * w, -1)


def _kernel_gradient(x: Picture, dy: Picture) -> Kernel:
    """The transforms' adjoints, round 16 products in float32."""

    def of_pixels(a: Array, b: Array) -> tuple[Array, ...]:
        return a, a + b, a - b, -b

    def to_kernel(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
        return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d

    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    dy = dy.astype(jnp.float32)
    tiles = _of_picture(padded)
    rows = of_pixels(dy[:, ::2], dy[:, 1::2])
    pixels = [
        [p.reshape(-1, dy.shape[3]) for p in of_pixels(r[:, :, ::2], r[:, :, 1::2])] for r in rows
    ]
    products = [[tiles[i][j].T @ pixels[i][j] for j in range(4)] for i in range(4)]
    columns = [to_kernel(*column) for column in zip(*products, strict=True)]
    return jnp.stack([jnp.stack(to_kernel(*row)) for row in zip(*columns, strict=True)])
