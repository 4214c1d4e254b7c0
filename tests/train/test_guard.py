import pathlib

import pytest

from safetydpo_jax.errors import UserError
from safetydpo_jax.train.guard import Guard
from safetydpo_jax.train.settings import resolve

FINE = {"loss": 0.7, "grad_norm": 1.0, "winner_error": 0.1}


@pytest.fixture
def guard(config):
    config.guard.winner_error, config.guard.patience = 0.5, 3
    return Guard(resolve(config), pathlib.Path("checkpoints"))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_at_once_when_a_number_is_lost(name, value, guard):
    guard.check(1, FINE)
    with pytest.raises(UserError, match=rf"{name} became {value} at step 2; .*learning_rate"):
        guard.check(2, FINE | {name: value})


def test_stops_when_the_winner_stays_bad(guard):
    bad = FINE | {"winner_error": 0.6}
    guard.check(1, bad)
    assert not guard.calm
    guard.check(2, bad)
    guard.check(3, FINE)
    assert guard.calm
    guard.check(4, bad)
    guard.check(5, bad)
    with pytest.raises(
        UserError, match=r"winner is collapsing: for 3 steps up to 6 .* in checkpoi"
    ):
        guard.check(6, bad)
