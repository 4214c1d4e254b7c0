"""The gated activation against JAX's own GELU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.models.geglu import geglu


def plain(x, gate):
    return x * jax.nn.gelu(gate, approximate=False)


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    gate = np.concatenate([rng.normal(size=60), [-12.0, -6.0, 0.0, 12.0]])
    return [jnp.asarray(x, jnp.float32) for x in (rng.normal(size=64), gate, rng.normal(size=64))]


def test_value_and_gradient(inputs):
    *arguments, dy = inputs
    y, pull_back = jax.vjp(geglu, *arguments)
    wanted, plain_pull_back = jax.vjp(plain, *arguments)
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    for found, expected in zip(pull_back(dy), plain_pull_back(dy), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_half_precision_is_rounded_once(inputs):
    *arguments, dy = (x.astype(jnp.bfloat16) for x in inputs)
    y, pull_back = jax.vjp(geglu, *arguments)
    wide = [x.astype(jnp.float32) for x in arguments]
    wanted, wide_pull_back = jax.vjp(plain, *wide)
    np.testing.assert_allclose(y, wanted, rtol=2**-8, atol=1e-7)
    for found, expected in zip(pull_back(dy), wide_pull_back(dy.astype(jnp.float32)), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-6)
