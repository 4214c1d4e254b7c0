import dataclasses

import numpy as np
import pytest

from safetydpo_jax.emoji import scenes
from safetydpo_jax.emoji.concepts import COLOURS, CONCEPTS
from safetydpo_jax.errors import UserError


def draw(count, split="train", concepts=None, seed=0):
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, split, concepts) for _ in range(count)]


def test_render_is_a_function_of_the_scene():
    for scene in draw(10):
        again = dataclasses.replace(scene)
        np.testing.assert_array_equal(scenes.render(scene), scenes.render(again))


def test_the_same_seed_gives_the_same_scenes():
    assert draw(20) == draw(20)
    assert draw(20) != draw(20, seed=1)


def test_a_plain_background_has_its_colour():
    place = scenes.Placement(44, 44, 30, 0)
    picture = scenes.render(scenes.Scene(("bell",), ("teal",), "small", (place,), None))
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[5, 5]) == COLOURS["teal"]
    assert np.abs(picture[44, 44].astype(int) - COLOURS["teal"]).max() > 50


@pytest.mark.parametrize(("angle", "first"), [(0, (32, 2)), (90, (2, 32)), (45, (2, 2))])
def test_the_first_colour_is_left_or_upper(angle, first):
    boundary = scenes.Boundary(angle, 0)
    picture = scenes.draw_background(("red", "white"), boundary)
    assert tuple(picture[first]) == COLOURS["red"]
    assert tuple(picture[63 - first[0], 63 - first[1]]) == COLOURS["white"]


def test_size_words_are_sizes():
    for scene in draw(300):
        if len(scene.concepts) == 1:
            low, high = scenes.SIZE_RANGES[scene.size]
            assert low <= scene.placements[0].size <= high


def test_two_pictograms_do_not_overlap():
    pairs = [s for s in draw(400) if len(s.concepts) == 2]
    for scene in pairs:
        one, other = scene.placements
        assert max(other.x - one.x, abs(other.y - one.y)) >= (one.size + other.size) / 2 - 0.5
        for p in scene.placements:
            assert p.size / 2 - 1 <= min(p.x, p.y)
            assert max(p.x, p.y) <= 65 - p.size / 2


def test_shares_of_scenes():
    drawn = draw(2500)
    two = np.mean([len(s.concepts) == 2 for s in drawn])
    two_tone = np.mean([len(s.background) == 2 for s in drawn])
    assert abs(two - scenes.TWO_SHARE) < 0.04
    assert abs(two_tone - scenes.TWO_TONE_SHARE) < 0.04


def test_concepts_are_drawn_equally_often():
    names = [name for s in draw(5000) for name in s.concepts]
    counts = [names.count(c.name) for c in CONCEPTS]
    mean = np.mean(counts)
    assert max(abs(n - mean) for n in counts) < 5 * np.sqrt(mean)


def test_splits_hold_different_combinations():
    drawn = {split: draw(400, split) for split in ("train", "tune", "test")}
    keys = {
        split: {(frozenset(s.concepts), frozenset(s.background)) for s in found}
        for split, found in drawn.items()
    }
    assert not keys["train"] & keys["tune"]
    assert not keys["train"] & keys["test"]
    assert not keys["tune"] & keys["test"]


def test_bucket_is_stable_and_blind_to_order():
    assert scenes.bucket(("dagger",), ("blue",)) == 51
    assert scenes.bucket(("bell", "dagger"), ("red", "blue")) == scenes.bucket(
        ("dagger", "bell"), ("blue", "red")
    )
    assert scenes.bucket(("dagger",), ("red",)) == scenes.bucket(("paintbrush",), ("red",))


def test_given_concepts_are_kept():
    assert all(s.concepts == ("bell", "dagger") for s in draw(5, concepts=("bell", "dagger")))


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        (("unheard of",), "unknown concept 'unheard of'"),
        ((), "one concept or two different ones"),
        (("bell", "bell"), "one concept or two different ones"),
        (("bell", "drum", "star"), "one concept or two different ones"),
    ],
)
def test_bad_concepts(concepts, message):
    with pytest.raises(UserError, match=message):
        scenes.sample_scene(np.random.default_rng(0), concepts=concepts)


def test_bad_split_colour_and_size():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"unknown split 'dev'.*tune"):
        scenes.sample_scene(rng, "dev")
    with pytest.raises(UserError, match="unknown colour 'mauve'"):
        scenes.arrange(rng, ("bell",), ("mauve",))
    with pytest.raises(UserError, match="size 'huge'"):
        scenes.arrange(rng, ("bell",), ("red",), "huge")
    with pytest.raises(UserError, match="size 'small' of a scene of 2"):
        scenes.arrange(rng, ("bell", "drum"), ("red",), "small")
