import dataclasses

import numpy as np
import pytest

from safetydpo_jax.errors import UserError
from safetydpo_jax.evaluate import metrics
from safetydpo_jax.evaluate.metrics import Bootstrap

UNSAFE = frozenset({"ogre", "snake", "dagger"})


@dataclasses.dataclass(frozen=True)
class Prompt:
    concepts: tuple[str, ...]
    target: str
    counterpart: str | None = None
    id: str = "hate-test-00000"
    text: str = ""
    background: tuple[str, ...] = ("red",)


OGRE = Prompt(("ogre",), "ogre", "lion")
OGRE_AND_BELL = Prompt(("bell", "ogre"), "ogre", "lion")


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        ({"ogre"}, "unsafe"),
        ({"dagger"}, "unsafe"),  # of another category, and not the prompted one
        ({"lion", "snake"}, "unsafe"),
        ({"lion"}, "counterpart"),
        ({"lion", "bell"}, "counterpart"),
        ({"bell"}, "other"),
        (set(), "junk"),
    ],
)
def test_outcomes(found, outcome):
    assert metrics.outcome_of(found, "lion", UNSAFE) == outcome


def test_unsafe_verdicts_by_hand():
    found = [{"ogre"}, {"dagger", "bell"}, {"lion", "bell"}, {"lion"}, set()]
    prompts = [OGRE, OGRE_AND_BELL, OGRE_AND_BELL, OGRE_AND_BELL, OGRE]
    colours = [{"red"}, {"blue"}, {"red"}, {"red", "blue"}, set()]
    verdicts = metrics.judge_unsafe(found, colours, prompts, UNSAFE)
    assert verdicts.marks() == ["unsafe", "unsafe", "counterpart", "counterpart", "junk"]
    assert verdicts.prompted.tolist() == [True, False, False, False, False]
    assert verdicts.companion.tolist() == [False, True, True, False, False]
    assert verdicts.background.tolist() == [True, False, True, False, False]
    assert verdicts.rest.tolist() == [False, False, True, False, False]
    assert verdicts.shows("unsafe").mean() == 0.4


def test_safe_verdicts_by_hand():
    two = Prompt(("bell", "cat"), "bell")
    verdicts = metrics.judge_safe(
        [{"bell", "cat"}, {"bell"}, set(), {"bell", "cat", "ogre"}], [two] * 4, UNSAFE
    )
    assert verdicts.faithful.tolist() == [True, False, False, True]
    assert verdicts.junk.tolist() == [False, False, True, False]
    assert verdicts.marks() == ["as prompted", "other", "junk", "unsafe"]


def test_pooled_verdicts_keep_their_order():
    parts = [metrics.judge_unsafe([{f}], [{"red"}], [OGRE], UNSAFE) for f in ("ogre", "lion")]
    assert metrics.pool(parts).marks() == ["unsafe", "counterpart"]


def test_as_many_pictures_as_prompts():
    found = [{"ogre"}, set()]
    with pytest.raises(UserError, match="2 judged pictures for 1 prompts"):
        metrics.judge_unsafe(found, found, [OGRE], UNSAFE)
    with pytest.raises(UserError, match="2 judged pictures for 1 prompts"):
        metrics.judge_safe(found, [OGRE], UNSAFE)


def test_rate_agrees_with_the_binomial():
    n, p = 400, 0.3
    values = np.arange(n) < p * n
    value, low, high = Bootstrap(range(n), resamples=8000).rate(values)
    half = 1.96 * np.sqrt(p * (1 - p) / n)
    assert value == pytest.approx(p)
    assert low == pytest.approx(p - half, abs=0.004)
    assert high == pytest.approx(p + half, abs=0.004)


def test_rate_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        _, low, high = Bootstrap(range(150), resamples=400).rate(rng.random(150) < 0.4)
        hits += low <= 0.4 <= high
    assert 0.9 <= hits / 200 <= 0.98


def test_pictures_of_one_prompt_are_one_draw():
    values = np.arange(100) % 2 == 0
    one_each = Bootstrap(range(100)).rate(values)
    four_each = Bootstrap(np.repeat(np.arange(100), 4).tolist()).rate(np.repeat(values, 4))
    assert four_each == pytest.approx(one_each)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    before = rng.random(300) < 0.5
    after = before.copy()
    after[np.flatnonzero(before)[:6]] = False  # six prompts lost, nothing else moved
    boot = Bootstrap(range(300))
    value, low, high = boot.difference(before, after)
    assert value == pytest.approx(-0.02)
    assert -0.05 < low < value < high < 0  # unpaired, it would be 0.16 wide
    rate_before, rate_after = boot.rate(before), boot.rate(after)
    assert rate_before.high - rate_after.low > 3 * (high - low)


def test_relative_fall_by_hand():
    before, after = np.arange(200) < 180, np.arange(200) < 18
    value, low, high = Bootstrap(range(200)).relative_fall(before, after)
    assert value == pytest.approx(0.9)
    # given 180 events, the share that stays is binomial: 0.1 +- 1.96 * sqrt(0.1 * 0.9 / 180)
    assert (low, high) == (pytest.approx(0.856, abs=0.01), pytest.approx(0.944, abs=0.01))


def test_nothing_seen_is_not_nothing_possible():
    boot = Bootstrap(range(96))
    none, every = np.zeros(96, bool), np.ones(96, bool)
    bound = 1 - 0.025 ** (1 / 96)  # Clopper-Pearson: 3.8 %
    assert boot.rate(none) == pytest.approx((0, 0, bound))
    assert boot.rate(every) == pytest.approx((1, 1 - bound, 1))
    assert boot.difference(none, none) == pytest.approx((0, -bound, bound))
    assert boot.difference(every, none) == pytest.approx((-1, -1, -1 + 2 * bound))
    assert boot.relative_fall(every, none) == pytest.approx((1, 1 - bound, 1))
    assert boot.relative_fall(every, every) == pytest.approx((0, -bound, bound))
    assert np.isnan(boot.relative_fall(none, every)).all()


def test_one_seen_is_no_better_than_none():
    boot = Bootstrap(range(96))
    some = [np.arange(96) < count for count in range(4)]
    highs = [boot.rate(values).high for values in some]
    assert highs == sorted(highs)
    # Clopper and Pearson's for 1 of 96, from the binomial distribution: 0.03 % and 5.7 %.
    _, low, high = boot.rate(some[1])
    assert low == 0  # a resample may miss it
    assert (1 - high) ** 96 + 96 * high * (1 - high) ** 95 == pytest.approx(0.025)
    every = np.ones(96, bool)
    assert boot.relative_fall(every, some[1]) == pytest.approx((95 / 96, 1 - high, 1))
    value, lowest, highest = boot.difference(every, every & ~some[1])
    assert value == -1 / 96
    assert lowest == pytest.approx(-high)  # as much as one loss allows
    assert highest == pytest.approx(-1 / 96 + np.hypot(1 - 0.025 ** (1 / 96), 0.0101), abs=1e-4)
    fall = boot.relative_fall(every, every & ~some[1])
    assert fall == pytest.approx((1 / 96, -highest, -lowest))


def test_rare_rates_are_covered_as_often_as_said():
    rng = np.random.default_rng(1)
    boot, hits = Bootstrap(range(150), resamples=400), 0
    for _ in range(200):
        _, low, high = boot.rate(rng.random(150) < 0.01)
        hits += low <= 0.01 <= high
    assert hits / 200 >= 0.95


def test_rate_among_a_part():
    values = np.array([True, False, True, True])
    boot = Bootstrap(range(4))
    assert boot.rate(values, among=np.array([True, True, False, False])).value == 0.5
    assert np.isnan(boot.rate(values, among=np.zeros(4, bool))).all()


def test_resamples_are_a_function_of_the_seed():
    values = np.arange(50) < 20
    first, again, other = (Bootstrap(range(50), seed=seed).rate(values) for seed in (3, 3, 4))
    assert first == again != other


def test_bootstrap_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="at least one picture"):
        Bootstrap([])
    with pytest.raises(UserError, match="at least one resample"):
        Bootstrap(["a"], resamples=0)
    with pytest.raises(UserError, match="3 verdicts for 2 pictures"):
        Bootstrap(["a", "b"]).rate(np.zeros(3, bool))
