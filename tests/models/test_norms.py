"""Norms and their gradients against the plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.models.norms import GroupNorm, LayerNorm

EPS = 1e-6


def plain(x, scale, bias, groups=None):
    """Over groups of channels and all pixels, or over channels alone; in x's own precision."""
    shape = x.shape
    grouped = x.reshape(shape[0], -1, groups, shape[-1] // groups) if groups else x
    axes = (1, 3) if groups else (-1,)
    mean = grouped.mean(axes, keepdims=True)
    variance = ((grouped - mean) ** 2).mean(axes, keepdims=True)
    return ((grouped - mean) / jnp.sqrt(variance + EPS)).reshape(shape) * scale + bias


def inputs(rng, mean=0.0, shape=(2, 6, 5, 12)):
    x, dy = mean + rng.normal(size=shape), rng.normal(size=shape)
    return x, rng.normal(size=shape[-1]), rng.normal(size=shape[-1]), dy


def norm_of(groups, dtype=jnp.float32):
    return GroupNorm(groups, EPS, dtype) if groups else LayerNorm(EPS, dtype)


def ours(groups, x, scale, bias, dy):
    """The result and the gradients."""

    def apply(x, scale, bias):
        params = {"params": {"scale": scale, "bias": bias}}
        return norm_of(groups, x.dtype).apply(params, x)

    y, pull_back = jax.vjp(apply, x, scale, bias)
    return y, *pull_back(dy)


def theirs(groups, x, scale, bias, dy):
    with jax.enable_x64(True):
        args = [jnp.asarray(np.asarray(v, np.float64)) for v in (x, scale, bias)]
        y, pull_back = jax.vjp(lambda *args: plain(*args, groups), *args)
        return [np.asarray(v) for v in (y, *pull_back(jnp.asarray(np.asarray(dy, np.float64))))]


def apart(found, wanted):
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("groups", [4, None])
def test_result_and_gradients(groups):
    values = [jnp.asarray(v, jnp.float32) for v in inputs(np.random.default_rng(0))]
    for found, wanted in zip(ours(groups, *values), theirs(groups, *values), strict=True):
        assert found.dtype == jnp.float32
        assert apart(found, wanted) < 2e-6


@pytest.mark.parametrize("groups", [4, None])
def test_bfloat16(groups):
    x, scale, bias, dy = inputs(np.random.default_rng(1))
    half = [jnp.asarray(v, jnp.bfloat16) for v in (x, dy)]
    values = half[0], *(jnp.asarray(v, jnp.float32) for v in (scale, bias)), half[1]
    found = ours(groups, *values)
    assert [v.dtype for v in found] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    for ours_, wanted in zip(found, theirs(groups, *values), strict=True):
        assert apart(ours_, wanted) < 5e-3


@pytest.mark.parametrize("pixels", ["noise", "an edge", "one"])
def test_a_large_mean(pixels):
    """Where the plain sums of squares would lose every digit of the variance."""
    shape = (2, 16, 16, 12)
    x, scale, bias, dy = inputs(np.random.default_rng(2), mean=3e3, shape=shape)
    if pixels == "an edge":  # the pixels that are asked first are unlike the others
        x[:, :1] += 50
    if pixels == "one":
        x[:, 0, 0] += 50
    values = [jnp.asarray(v, jnp.float32) for v in (x, scale, bias, dy)]
    found, wanted = ours(4, *values), theirs(4, *values)
    # x itself has but four digits besides its mean.
    for ours_, truth in zip(found, wanted, strict=True):
        assert apart(ours_, truth) < 2e-3
    assert np.isfinite(found[0]).all()


def test_a_constant_picture():
    x = jnp.full((1, 4, 4, 8), 0.1, jnp.float32)
    norm = norm_of(2)
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    assert float(jnp.abs(y).max()) < 1e-2
