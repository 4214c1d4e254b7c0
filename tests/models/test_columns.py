"""A convolution as one matrix product is the same convolution, with the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.models import columns, layers
from safetydpo_jax.models.layers import Conv


def native(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dims)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 1, 1, 3)])
def test_answers_and_gradients(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, shape[-1], 7))
    dy = jax.random.normal(jax.random.key(2), (*shape[:3], 7))
    for f, g in zip(*((y, *pull(dy)) for y, pull in (
        jax.vjp(columns.conv3x3, x, kernel), jax.vjp(native, x, kernel)
    )), strict=True):  # fmt: skip
        np.testing.assert_allclose(f, g, atol=1e-4)


@pytest.mark.parametrize(("pixels", "channels", "pays"), [
    (8, 1280, True), (16, 640, True), (8, 320, False), (64, 640, False),
])  # fmt: skip
def test_who_gets_it(pixels, channels, pays):
    """On a CPU; what is compiled for other platforms has the plain convolution."""
    conv = Conv(channels)
    x = jax.ShapeDtypeStruct((2, pixels, pixels, channels), jnp.float32)
    params = jax.eval_shape(conv.init, jax.random.key(0), x)
    traced = jax.jit(conv.apply).trace(params, x)
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert ("stablehlo.dot_general" in lowered["cpu"]) == pays
    assert ("stablehlo.convolution" in lowered["cpu"]) != pays
    assert "stablehlo.convolution" in lowered["tpu"]
    assert "stablehlo.dot_general" not in lowered["tpu"]


@pytest.mark.parametrize(("strides", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_the_plain_convolution_has_its_gradient_and_keeps_no_input(strides, padding):
    x, kernel = jax.random.normal(jax.random.key(0), (2, 8, 8, 5)), jnp.ones((3, 3, 5, 6))

    def loss(f):
        return lambda x, kernel: (f(x, kernel, strides, padding) ** 3).sum()

    got = jax.jit(jax.grad(loss(layers._convolution), (0, 1)))(x, kernel)
    wanted = jax.grad(loss(layers._convolve), (0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted)
    # Linear in x: with the kernel frozen its gradient needs no x.
    _, pull_back = jax.vjp(lambda x: layers._convolution(x, kernel, strides, padding), x)
    assert all(
        leaf.size < x.size for leaf in jax.tree.leaves(pull_back) if leaf.shape != kernel.shape
    )
