import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.train import losses

BETA = 50.0


def test_example():
    assert doctest.testmod(losses).failed == 0


# As published: h is log(policy / reference) of the winner less that of the loser, z is beta h.
PUBLISHED = {
    "dpo": lambda h: -np.log(1 / (1 + np.exp(-BETA * h))),
    "ipo": lambda h: BETA**2 * (h - 1 / (2 * BETA)) ** 2,
    "hinge": lambda h: np.maximum(0, 1 - BETA * h),
    "winner_preserving": lambda h: -np.log(1 / (1 + np.exp(-BETA * h))),
}


@pytest.mark.parametrize("preference", losses.PREFERENCES)
def test_equals_the_papers(preference):
    rng = np.random.default_rng(0)
    win, lose, win_ref, lose_ref = rng.uniform(0.1, 0.2, (4, 64))
    h = -1 / 2 * ((win - lose) - (win_ref - lose_ref))
    winner, loser = (jnp.asarray(x, jnp.float32) for x in (win - win_ref, lose - lose_ref))
    margin = losses.preference_margin(winner, loser, BETA)
    np.testing.assert_allclose(margin, BETA * h, rtol=1e-4, atol=1e-5)
    assert margin.min() < -1
    assert margin.max() > 1
    got = losses.PREFERENCES[preference](margin)
    np.testing.assert_allclose(got, PUBLISHED[preference](h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("preference", "value", "slope"),
    [("dpo", np.log(2), -0.5), ("ipo", 0.25, -1.0), ("hinge", 1.0, -1.0)],
)
def test_where_policy_and_reference_agree(preference, value, slope):
    zero = losses.preference_margin(jnp.zeros(3), jnp.zeros(3), beta=5000.0)
    got, pull_back = jax.vjp(losses.PREFERENCES[preference], zero)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(pull_back(jnp.ones(3))[0], slope, rtol=1e-6)


@pytest.mark.parametrize("preference", losses.PREFERENCES)
@pytest.mark.parametrize("margin", [-1e5, 1e5])
def test_stays_finite_far_out(margin, preference):
    value, pull_back = jax.vjp(losses.PREFERENCES[preference], jnp.full(1, margin))
    assert np.isfinite(value).all()
    assert np.isfinite(pull_back(jnp.ones(1))[0]).all()


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# In these trees G_w = (3, 4), so that |G_w|^2 is 25.
@pytest.mark.parametrize(
    ("loser", "scale"),
    [
        ((1.0, 1.0), 1.0),  # agrees with the winner
        ((4.0, -3.0), 1.0),  # has nothing to do with it
        ((-1.0, -2.0), 1.0),  # opposes it, but is the weaker
        ((-6.0, -8.0), 0.5),
        ((10.0, -20.0), 0.5),
    ],
)
def test_the_losers_gradient_gives_way_to_the_winners(loser, scale):
    winner, loser = (
        {"a": jnp.array(x), "b": {"c": jnp.array([y])}} for x, y in ((3.0, 4.0), loser)
    )
    gradient, got = losses.preserve_winner(winner, loser)
    assert float(got) == pytest.approx(scale)
    np.testing.assert_allclose(flat(gradient), flat(winner) + scale * flat(loser), atol=1e-6)
    assert flat(gradient) @ flat(winner) >= -1e-6


@pytest.mark.parametrize("loser", [0.0, -1.0])
def test_a_winner_without_a_gradient(loser):
    with jax.debug_nans(True):
        gradient, scale = losses.preserve_winner({"a": jnp.zeros(2)}, {"a": jnp.full(2, loser)})
    assert scale == 1
    np.testing.assert_array_equal(gradient["a"], np.full(2, loser))


def test_squared_error_is_a_float32_mean_over_all_but_the_batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    got = losses.squared_error(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y))
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, ((rounded - y) ** 2).mean((1, 2, 3)), rtol=1e-6)
