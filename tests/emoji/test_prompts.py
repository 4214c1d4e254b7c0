import hashlib
import re

import numpy as np
import pytest

from safetydpo_jax.emoji import prompts, scenes
from safetydpo_jax.emoji.concepts import (
    CATEGORY_OF,
    CONCEPTS,
    HARMS,
    ORDINARY_EVAL,
    ORDINARY_TRAIN,
)
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES, Harm, HarmPair

SINGULAR = {"bus", "cactus", "compass", "dress", "hourglass", "octopus", "stack of books"}
HATE = HARMS["hate"]
SPLITS = ("train", "tune", "test", "held_out_concepts")


@pytest.fixture(scope="module")
def harm():
    return {(c, s): prompts.harm_prompts(h, 30, 3, s) for c, h in HARMS.items() for s in SPLITS}


@pytest.fixture(scope="module")
def safe():
    return {split: prompts.safe_prompts(200, 3, split) for split in ("train", "tune", "test")}


def in_wordings(text, wordings):
    """Whether the text could come from one of the wordings."""
    parts = {"what": ".+", "bare": ".+", "ground": "an? .+ background", "colour": ".+"}
    return any(re.fullmatch(wording.format(**parts), text) for wording in wordings)


def test_prompts_are_functions_of_their_arguments(harm, safe):
    assert prompts.harm_prompts(HATE, 30, 3, "test") == harm["hate", "test"]
    assert prompts.harm_prompts(HATE, 20, 3, "test") == harm["hate", "test"][:20]
    assert prompts.harm_prompts(HATE, 30, 4, "test") != harm["hate", "test"]
    assert prompts.safe_prompts(200, 3, "tune") == safe["tune"]


def test_ids_and_texts_are_unique(harm, safe):
    for (category, split), pairs in harm.items():
        assert pairs[12][0].id == f"{category}-{split}-00012"
        assert pairs[12][1].id == f"{category}-{split}-00012-safe"
        assert len({unsafe.text for unsafe, _ in pairs}) == len(pairs)
    for split, records in safe.items():
        assert records[7].id == f"safe-{split}-00007"
        assert len({r.text for r in records}) == len(records)


def test_a_twin_differs_in_the_concept_only(harm):
    for (category, _), pairs in harm.items():
        for unsafe, twin in pairs:
            assert unsafe.category == twin.category == category
            assert (twin.target, twin.counterpart) == (unsafe.counterpart, None)
            assert unsafe.background == twin.background
            swapped = tuple(twin.target if n == unsafe.target else n for n in unsafe.concepts)
            assert twin.concepts == swapped
            bare = [
                re.sub(rf"\ban? (?=(small |large )?{r.target})", "", r.text) for r in (unsafe, twin)
            ]
            assert bare[0].replace(unsafe.target, twin.target) == bare[1]


def test_splits_are_disjoint(harm, safe):
    for category in CATEGORIES:
        texts = [{u.text for u, _ in harm[category, split]} for split in SPLITS]
        assert len(set.union(*texts)) == sum(map(len, texts))
    texts = [{r.text for r in records} for records in safe.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))


def test_held_out_concepts_are_in_their_split_only(harm):
    for (category, split), pairs in harm.items():
        held_out = {p.unsafe for p in HARMS[category].concepts if p.held_out}
        shown = {unsafe.target for unsafe, _ in pairs}
        if split == "held_out_concepts":
            assert shown == held_out
        else:
            assert shown <= HARMS[category].unsafe_names - held_out


def test_combinations_are_those_of_the_split(harm, safe):
    records = [(s, r) for (_, s), pairs in harm.items() for pair in pairs for r in pair]
    records += [(s, r) for s, found in safe.items() for r in found]
    for split, record in records:
        buckets = scenes.SPLITS["held_out" if split == "held_out_concepts" else split]
        assert scenes.bucket(record.concepts, record.background) in buckets


def test_wordings_are_those_of_the_split(harm):
    for (_, split), pairs in harm.items():
        own, other = ("train", "held_out") if split == "train" else ("held_out", "train")
        for unsafe, twin in pairs:
            assert in_wordings(unsafe.text, prompts.WORDINGS[own])
            assert in_wordings(twin.text, prompts.WORDINGS[own])
        assert not set(prompts.WORDINGS[own]) & set(prompts.WORDINGS[other])


def test_held_out_wordings_use_words_that_training_knows():
    words = [set(re.findall(r"[a-z{}]+", " ".join(w))) for w in prompts.WORDINGS.values()]
    assert words[1] <= words[0]


def test_ordinary_concepts_of_training_and_evaluation_do_not_meet(harm, safe):
    for split, records in safe.items():
        allowed = ORDINARY_TRAIN if split == "train" else ORDINARY_EVAL
        assert {name for r in records for name in r.concepts} <= set(allowed)
    for (_, split), pairs in harm.items():
        companions = {n for u, _ in pairs for n in u.concepts if n != u.target}
        assert companions <= set(ORDINARY_TRAIN if split == "train" else ORDINARY_EVAL)


def test_a_third_have_a_companion(harm):
    two = [len(u.concepts) == 2 for pairs in harm.values() for u, _ in pairs]
    assert abs(np.mean(two) - 1 / 3) < 0.06


def test_training_stream():
    stream = list(prompts.training_scenes(5, 2000))
    assert stream[1234] == prompts.training_scene(5, 1234)
    assert stream[0] != prompts.training_scene(6, 0)
    for scene, text in stream:
        assert scenes.bucket(scene.concepts, scene.background) in scenes.SPLITS["train"]
        assert in_wordings(text, prompts.WORDINGS["train"])
        assert len(text.split()) <= 20
        assert all(name in text for name in (*scene.concepts, *scene.background))
    assert {name for scene, _ in stream for name in scene.concepts} == {c.name for c in CONCEPTS}


def test_articles():
    write = prompts.write_prompt
    wording = "a photo of {what} on {ground}"
    assert write(wording, ("dagger",), ("blue",)) == "a photo of a dagger on a blue background"
    assert write(wording, ("axe", "owl"), ("orange", "red")) == (
        "a photo of an axe and an owl on an orange and red background"
    )
    assert write(wording, ("eggplant",), ("red",), "small") == (
        "a photo of a small eggplant on a red background"
    )
    assert write("{bare}, {colour} background", ("red apple", "bell"), ("yellow",), "small") == (
        "small red apple and a bell, yellow background"
    )
    assert prompts.with_article("hourglass") == "an hourglass"
    assert prompts.with_article("unicorn") == "a unicorn"
    assert prompts.with_article("umbrella") == "an umbrella"
    assert prompts.with_article("large grapes") == "large grapes"
    for concept in CONCEPTS:
        phrase = prompts.with_article(concept.name)
        assert not re.match(r"a [aeio]|an [^aeiouh]", phrase)
        if concept.name.endswith("s") and phrase != concept.name:
            assert concept.name in SINGULAR


def test_describe_follows_the_split():
    rng = np.random.default_rng(0)
    scene = scenes.sample_scene(rng)
    assert in_wordings(prompts.describe(scene, rng, "held_out"), prompts.WORDINGS["held_out"])
    with pytest.raises(UserError, match="unknown wordings 'dev'"):
        prompts.describe(scene, rng, "dev")


def test_preserved_are_ordinary_training_concepts_and_every_third_a_counterpart():
    preserved = prompts.preserve_prompts(HATE, 200, 3)
    assert len({record.text for record in preserved}) == len({r.id for r in preserved}) == 200
    assert all(in_wordings(r.text, prompts.WORDINGS["train"]) for r in preserved)
    assert [r.category for r in preserved[2::3]] == [CATEGORIES[i % 7] for i in range(66)]
    assert not {r.target for r in preserved[2::3]} & CATEGORY_OF.keys()
    rest = [r for i, r in enumerate(preserved) if i % 3 != 2]
    assert {name for r in rest for name in r.concepts} <= set(ORDINARY_TRAIN)
    assert prompts.preserve_prompts(HATE, 0, 3) == []


def test_a_harm_of_the_users_has_prompts_of_its_own():
    pairs = (HarmPair("hamburger", "pizza"), HarmPair("cat", "owl", held_out=True))
    harm = Harm("food", pairs)
    train, test, held_out = (
        prompts.harm_prompts(harm, 100, 3, s) for s in ("train", "test", "held_out_concepts")
    )
    assert train[7][0].id == "food-train-00007"
    assert {unsafe.target for unsafe, _ in (*train, *test)} == {"hamburger"}
    assert {unsafe.target for unsafe, _ in held_out} == {"cat"}
    for unsafe, twin in (*train, *test, *held_out):
        assert (twin.target, twin.category) == (unsafe.counterpart, "food")
        assert not (set(twin.concepts) - {twin.target}) & harm.names
    other = prompts.harm_prompts(Harm("foods", pairs), 100, 3)
    assert [u.text for u, _ in other] != [u.text for u, _ in train]


def test_what_is_unsafe_in_a_harm_is_in_no_safe_prompt():
    # An ordinary concept, and the counterpart that stands for one of hate's.
    harm = Harm("food", (HarmPair("hamburger", "pizza"), HarmPair("lion", "owl")))
    preserved = prompts.preserve_prompts(harm, 240, 3)
    assert not {name for r in preserved for name in r.concepts} & harm.unsafe_names
    assert [r.category for r in preserved[2::3]] == [
        [*CATEGORIES, "food"][i % 8] for i in range(80)
    ]
    avoid = frozenset({"cat", "frog"})
    safe = prompts.safe_prompts(300, 3, "test", avoid=avoid)
    assert {name for r in safe for name in r.concepts} == set(ORDINARY_EVAL) - avoid


def test_prompts_of_the_categories_stay_as_they_were():
    """Pairs drawn before and reports compared over time depend on every letter."""

    def digest(records):
        said = [f"{record.id}{record.text}" for record in records]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]

    harms = [
        record
        for harm in HARMS.values()
        for split in SPLITS
        for pair in prompts.harm_prompts(harm, 20, 3, split)
        for record in pair
    ]
    assert digest(harms) == "9808ff30103285f1"
    safe = [r for s in ("train", "tune", "test") for r in prompts.safe_prompts(60, 3, s)]
    assert digest(safe) == "bffdd51dc13de4a6"
    assert digest(prompts.preserve_prompts(HATE, 100, 3)) == "8e4edc403a13ebad"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts.harm_prompts(HATE, 1, 0, "dev"), "unknown split 'dev' of prompts"),
        (lambda: prompts.safe_prompts(1, 0, "dev"), "unknown split 'dev' of prompts"),
        (lambda: prompts.safe_prompts(1, 0, "held_out_concepts"), "only harm prompts"),
        (lambda: prompts.safe_prompts(-1, 0), "cannot draw -1 prompts"),
        (
            lambda: prompts.harm_prompts(HATE, 3000, 0, "held_out_concepts"),
            "only about .* different prompts, not 3000",
        ),
        (lambda: prompts.write_prompt("{what}", ("axe",), ("red",), "huge"), "size word 'huge'"),
        (lambda: prompts.write_prompt("{what}", ("axe",), ("mauve",)), "unknown colour 'mauve'"),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(UserError, match=message):
        call()
