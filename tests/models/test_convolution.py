"""Which form a convolution takes, and that each is the convolution, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.models import columns, layers, winograd
from safetydpo_jax.models.layers import Conv
from safetydpo_jax.models.target import compiling_for
from safetydpo_jax.train.step import KEEP_BARRIERS


def native(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dims)


def numbers(shape, features=7):
    rng = np.random.default_rng(0)
    shapes = shape, (3, 3, shape[-1], features), (*shape[:3], features)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def differences(conv, x, kernel, dy):
    """Of the answer, of dx and of dkernel, each over the largest of the native one's."""

    def answers(f, x, kernel, dy):
        y, pull = jax.vjp(f, x, kernel)
        return y, *pull(dy)

    winograd._convolve.clear_cache()  # which does not know of MOST_BYTES
    both = [jax.jit(functools.partial(answers, f))(x, kernel, dy) for f in (conv, native)]
    winograd._convolve.clear_cache()
    return [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*both, strict=True)]


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 1, 1, 3)])
def test_as_one_product(shape):
    assert max(differences(columns.conv3x3, *numbers(shape))) < 1e-6


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 2, 2, 3), (3, 12, 8, 16)])
@pytest.mark.parametrize("most", [winograd.MOST_BYTES, 2**14, 1])
def test_winograd(shape, most, monkeypatch):
    """At once, and in strips of several rows of tiles and of one."""
    monkeypatch.setattr(winograd, "MOST_BYTES", most)
    assert max(differences(winograd.conv3x3, *numbers(shape))) < 1e-6


@pytest.mark.parametrize("shape", [(2, 8, 8, 32)])
def test_a_kernel_that_is_kept_is_transformed_once(shape, optimised):
    """For the policy, the reference and the gradient."""
    x, kernel, dy = numbers(shape)

    def answers(x, kernel, dy):
        y, pull_back = jax.vjp(lambda x: winograd.conv3x3(x, kernel), x)
        return y, winograd.conv3x3(2 * x, kernel), pull_back(dy)

    found = []
    for kept in (False, True):
        with winograd.kernels_kept(kept):
            found.append(jax.jit(answers).lower(x, kernel, dy).compile(KEEP_BARRIERS))
    plain, spared = (program.cost_analysis()["flops"] for program in found)
    # Two of three times four sums to each of three columns and of four rows, and more.
    assert plain - spared >= 2 * 4 * 7 * kernel[0, 0].size
    for a, b in zip(*(program(x, kernel, dy) for program in found), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, b)


def test_winograd_with_bfloat16_operands():
    """Sums of float32, as of a product with such operands."""

    def half(x, kernel):
        return winograd.conv3x3(x, kernel, half=True)

    found = differences(half, *numbers((2, 8, 8, 64)))
    assert 1e-4 < max(found[:2]) < 1e-2


def test_winograd_keeps_the_type_of_the_picture():
    x, kernel, dy = (a.astype(jnp.bfloat16) for a in numbers((2, 4, 4, 8)))
    y, pull_back = jax.vjp(winograd.conv3x3, x, kernel)
    assert {a.dtype for a in (y, *pull_back(dy))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(
        *(np.asarray(a, np.float32) for a in (y, native(x, kernel))), atol=0.1
    )


@pytest.mark.parametrize(("rows", "pixels", "channels", "products"), [
    (8, 8, 1280, 16), (2, 16, 640, 16), (40, 16, 64, 16), (4, 8, 1280, 1), (2, 7, 1280, 1),
    (2, 8, 320, 0), (2, 64, 16, 0),
])  # fmt: skip
def test_who_gets_which(rows, pixels, channels, products):
    """On a CPU; what is compiled for other platforms has the plain convolution."""
    conv = Conv(channels)
    x = jax.ShapeDtypeStruct((rows, pixels, pixels, channels), jnp.float32)
    params, apply = jax.eval_shape(conv.init, jax.random.key(0), x), jax.jit(conv.apply)
    on_cpu = apply.trace(params, x).lower(lowering_platforms=("cpu",)).as_text()
    assert on_cpu.count("stablehlo.dot_general") == products
    assert ("stablehlo.convolution" in on_cpu) == (products == 0)
    with compiling_for("tpu"):
        on_tpu = apply.trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" in on_tpu
    assert "stablehlo.dot_general" not in on_tpu


@pytest.mark.parametrize("features", [64, 8])
def test_with_the_kernel_frozen_no_input_is_kept(features):
    """A convolution is linear in x: its gradient needs none."""
    conv, x = Conv(features), jax.random.normal(jax.random.key(0), (4, 16, 16, 64))
    params = conv.init(jax.random.key(1), x)
    _, pull_back = jax.vjp(lambda x: conv.apply(params, x), x)
    assert all(leaf.size < x.size for leaf in jax.tree.leaves(pull_back))


@pytest.mark.parametrize(("strides", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_the_plain_convolution_has_its_gradient_and_keeps_no_input(strides, padding):
    x, kernel = jax.random.normal(jax.random.key(0), (2, 8, 8, 5)), jnp.ones((3, 3, 5, 6))

    def loss(f):
        return lambda x, kernel: (f(x, kernel, strides, padding) ** 3).sum()

    got = jax.jit(jax.grad(loss(layers.convolution), (0, 1)))(x, kernel)
    wanted = jax.grad(loss(layers._convolve), (0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted)
    # Linear in x: with the kernel frozen its gradient needs no x.
    _, pull_back = jax.vjp(lambda x: layers.convolution(x, kernel, strides, padding), x)
    assert all(
        leaf.size < x.size for leaf in jax.tree.leaves(pull_back) if leaf.shape != kernel.shape
    )
