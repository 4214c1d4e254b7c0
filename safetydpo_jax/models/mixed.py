"""Matrix products with bfloat16 operands and float32 sums, made fast on CPUs.

On x86 processors that multiply bfloat16 themselves XLA's CPU backend has kernels for bfloat16 x
bfloat16 -> float32 that are faster than its float32 ones, but reaches them only for products that
are laid out plainly, and never for convolutions (`winograd` makes products of those). The layers
take these forms on such a CPU when JAX's own switch asks for that precision: `with
jax.default_matmul_precision("bfloat16")`. On other CPUs such products are float32's with more work,
and slower, so there the layers stay with float32. Accelerators do the same by themselves. Measured
in benchmarks/cpu_matmul.py.
"""

import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safetydpo_jax.models.target import target


@functools.cache
def has_units() -> bool:
    """Whether the processor multiplies bfloat16 itself; known on Linux, on x86."""
    info = pathlib.Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    flags = re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE)
    return bool(flags and {"avx512_bf16", "amx_bf16"} & set(flags[1].split()))


def wanted() -> bool:
    """Whether layers should use these forms: asked for, on a CPU that gains by them."""
    config: Any = jax.config  # its settings are attributes made at run time
    asked = config.jax_default_matmul_precision == "bfloat16"
    return asked and target() == "cpu" and has_units()


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Of two matrices with bfloat16 operands, over these axes; float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _transposed_product(x: Float[Array, "n i"], y: Float[Array, "n o"]) -> Float[Array, "i o"]:
    """x^T y in float32: XLA transposes bfloat16 operands so slowly that it would cost more."""
    return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())))


@jax.custom_vjp
def matmul(x: Float[Array, "*batch i"], w: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """x @ w with bfloat16 operands, summed in float32; gradients likewise."""
    return product(x.reshape(-1, x.shape[-1]), w, (1, 0)).reshape(*x.shape[:-1], w.shape[1])


def _matmul_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w), (x, w)


def _matmul_bwd(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    dy = dy.reshape(-1, dy.shape[-1])
    dx = product(dy, w, (1, 1)).reshape(x.shape)
    return dx, _transposed_product(x.reshape(-1, x.shape[-1]), dy)


matmul.defvjp(_matmul_fwd, _matmul_bwd)
