import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.train import losses


def test_example():
    assert doctest.testmod(losses).failed == 0


def test_equals_the_paper():
    rng = np.random.default_rng(0)
    win, lose, win_ref, lose_ref = rng.uniform(0.1, 2, (4, 16))
    logit = -50 / 2 * ((win - lose) - (win_ref - lose_ref))
    expected = -np.log(1 / (1 + np.exp(-logit)))
    got = losses.dpo_loss(
        *(jnp.asarray(x, jnp.float32) for x in (win, lose, win_ref, lose_ref)), beta=50
    )
    np.testing.assert_allclose(got.loss, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.margin, logit, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.correct, logit > 0)


def test_is_log_2_where_policy_and_reference_agree():
    win, lose = jnp.full(3, 0.3), jnp.full(3, 0.7)
    got = losses.dpo_loss(win, lose, win, lose, beta=5000)
    np.testing.assert_allclose(got.loss, np.log(2), rtol=1e-6)
    assert not got.correct.any()


@pytest.mark.parametrize("margin", [-1e5, 1e5])
def test_stays_finite_far_out(margin):
    error = jnp.full(1, -margin)
    value, gradient = jax.value_and_grad(
        lambda x: losses.dpo_loss(x, error * 0, error * 0, error * 0, beta=2.0).loss[0]
    )(error)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_squared_error_is_a_float32_mean_over_all_but_the_batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    got = losses.squared_error(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y))
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, ((rounded - y) ** 2).mean((1, 2, 3)), rtol=1e-6)
