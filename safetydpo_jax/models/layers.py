"""Layers shared by the UNet, the autoencoder and the text encoder.

Every module is named after the piece of the PyTorch state dict that it holds (Linen names may
contain dots), so a parameter path joined with "." is the state-dict key of its module.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from safetydpo_jax.models import adapter_products, columns, mixed, winograd
from safetydpo_jax.models.norms import GroupNorm
from safetydpo_jax.models.parameter import parameter
from safetydpo_jax.models.target import target
from safetydpo_jax.models.tpu_attention import shared_mesh

Padding = tuple[tuple[int, int], tuple[int, int]]


def together(x: Array, a: Array, b: Array) -> list[Array]:
    """The same, whose gradients are all there before one of them is used.

    Nobody waits for an adapter's gradient, and the compiler would leave it for the end of a step:
    until then it would keep what the gradient is made of, in Stable Diffusion half a gigabyte.
    """
    return jax.lax.optimization_barrier([x, a, b])


class Dense(nn.Module):
    """A linear layer that adds a low-rank adapter when the caller passes one.

    The adapter lives in a collection of its own, "lora", with leaves `a` (in, rank) and `b` (rank,
    features); without the collection the very same call is the frozen reference layer. `W + AB` is
    never formed: it would cost a full weight gradient and round the adapter away in bfloat16.

    With `parts` above 1 the result is a tuple of so many, side by side in the layer's features.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    parts: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Any:
        kernel = parameter(
            self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)
        )
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros_init(), (self.features,))
        x, batch, on_tpu = x.astype(self.dtype), x.shape[:-1], target() == "tpu"
        # As one plain product: XLA's gradient of a batched one is four times slower on a CPU. A
        # TPU's layouts, in which tokens lie along the lanes, would have to be turned round for it.
        rows = x if on_tpu else x.reshape(-1, x.shape[-1])
        h = b = None
        narrow = on_tpu and self.dtype == jnp.bfloat16
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            # Adapters are applied in their own precision: a small delta must survive bfloat16.
            adapted, a, b = together(rows, a, b)
            h = adapter_products.down(adapted, a) if narrow else adapted.astype(a.dtype) @ a
            if self.has_variable("lora", "gate"):
                gate = self.get_variable("lora", "gate")
                h = (h.reshape(len(gate), -1, h.shape[-1]) * gate[:, None]).reshape(h.shape)

        def product(kernel: Array, bias: Array | None, b: Array | None) -> Array:
            if mixed.wanted():
                y = mixed.matmul(rows, kernel).astype(self.dtype)
            else:
                y = rows @ kernel.astype(self.dtype)
            if bias is not None:
                y = y + bias.astype(self.dtype)
            if h is not None and b is not None:
                y = y + (adapter_products.up(h, b) if narrow else (h @ b).astype(self.dtype))
            return y.reshape(*batch, kernel.shape[-1])

        if self.parts == 1:
            return product(kernel, bias, b)
        if not on_tpu or self._is_split():
            return tuple(jnp.split(product(kernel, bias, b), self.parts, -1))
        # Each by itself: to take a result apart is a copy there, as is joining its gradient.
        split = [
            [None] * self.parts if w is None else jnp.split(w, self.parts, -1)
            for w in (kernel, bias, b)
        ]
        return tuple(product(*part) for part in zip(*split, strict=True))

    def _is_split(self) -> bool:
        """Whether features may be spread over devices, whose sums of gradients are sent."""
        mesh = shared_mesh()
        return mesh is not None and mesh.shape["tensor"] > 1


class Conv(nn.Module):
    """A 2-D convolution, NHWC, kernel HWIO, with PyTorch's symmetric or explicit padding.

    An adapter's `a` (kh, kw, in, rank) is a convolution like it, its `b` (rank, features) is
    applied to every pixel of the result; see `Dense`.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | Padding = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        k = self.kernel_size
        kernel = parameter(
            self, "kernel", nn.initializers.lecun_normal(), (k, k, x.shape[-1], self.features)
        )
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (self.features,))
        if mixed.wanted() and k == 1:
            y = mixed.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0]).astype(self.dtype)
            y = y.reshape(*x.shape[:-1], self.features)
        else:
            convolve = self._of_cpu(x.shape) or self._convolve
            y = convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        y = y + bias.astype(self.dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            x, a, b = together(x, a, b)
            h = self._convolve(x.astype(a.dtype), a)
            if self.has_variable("lora", "gate"):
                h = h * self.get_variable("lora", "gate")[:, None, None]
            y = y + (h @ b).astype(self.dtype)
        return y

    def _of_cpu(self, shape: tuple[int, ...]) -> Callable[[Array, Array], Array] | None:
        """What is faster on a CPU than XLA's own convolution, if anything."""
        if target() != "cpu" or (self.kernel_size, self.strides, self.padding) != (3, 1, 1):
            return None
        if winograd.pay(shape, self.features):
            return functools.partial(winograd.conv3x3, half=mixed.wanted())
        return columns.conv3x3 if columns.pay(shape, self.features) else None

    def _convolve(
        self, x: Float[Array, "b h w in"], kernel: Float[Array, "kh kw in out"]
    ) -> Float[Array, "b h2 w2 out"]:
        pad = self.padding
        return convolution(
            x, kernel, self.strides, ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
        )


def _convolve(x: Array, kernel: Array, strides: int, padding: Padding) -> Array:
    """By XLA, with its own gradient; NHWC and HWIO."""
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


convolution = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))


def _convolution_forward(
    x: Any, kernel: Any, strides: int, padding: Padding
) -> tuple[Array, tuple[Array | None, Array, Array]]:
    """x is kept for the kernel's gradient alone, else of it but the shape, as an empty array."""
    y = _convolve(x.value, kernel.value, strides, padding)
    shape = jnp.zeros_like(x.value, shape=(0, *x.value.shape))
    return y, (x.value if kernel.perturbed else None, kernel.value, shape)


def _convolution_backward(
    strides: int, padding: Padding, kept: tuple[Array | None, Array, Array], dy: Array
) -> tuple[Array, Array | None]:
    """Its own, with the kernel not before dy: XLA would turn it round at once, and keep it."""
    x, kernel, shape = kept
    kernel, dy = jax.lax.optimization_barrier((kernel, dy))
    like = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
    [dx] = jax.linear_transpose(lambda x: _convolve(x, kernel, strides, padding), like)(dy)
    if x is None:
        return dx, None
    [dkernel] = jax.linear_transpose(lambda k: _convolve(x, k, strides, padding), kernel)(dy)
    return dx, dkernel


convolution.defvjp(_convolution_forward, _convolution_backward, symbolic_zeros=True)


class Embedding(nn.Module):
    """A lookup table (num, features)."""

    num: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Shaped[Array, "*batch"]) -> Float[Array, "*batch c"]:
        table = parameter(
            self, "embedding", nn.initializers.normal(0.02), (self.num, self.features)
        )
        return table.astype(self.dtype)[ids]


class ResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D: norm, silu, conv, (+ time), norm, silu, conv, + shortcut."""

    features: int
    groups: int
    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w in"], temb: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w out"]:
        h = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        if temb is not None:
            t = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))
            h = h + t[:, None, None, :]
        h = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            shortcut = Conv(self.features, 1, padding=0, dtype=self.dtype, name="conv_shortcut")
            x = shortcut(x)
        return x + h


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Doubles height and width by repetition (torch's `interpolate(scale_factor=2)`)."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def sinusoidal_embedding(
    t: Shaped[Array, "n"], dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "n dim"]:
    """Sinusoids of timesteps or other scalars, as diffusers' `get_timestep_embedding`.

    Args:
      t: the scalars, any real dtype.
      dim: size of the embedding, even.
      flip_sin_to_cos: cosines first (Stable Diffusion) or sines first.
      freq_shift: subtracted from dim / 2 in the exponent's denominator.
    """
    half = dim // 2
    freqs = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    args = t.astype(jnp.float32)[:, None] * freqs[None]
    sin, cos = jnp.sin(args), jnp.cos(args)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], -1)
