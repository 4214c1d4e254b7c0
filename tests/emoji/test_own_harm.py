import dataclasses
import types

import pytest

from safetydpo_jax.emoji.concepts import HARMS
from safetydpo_jax.emoji.own_harm import embedded, harm_of, training_prompts
from safetydpo_jax.emoji.prompts import harm_prompts
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import Harm, HarmPair

DICE = ("two men with a dice on a table", "two men with a red apple on a table")
SLOT = ("Slot machine, a bell beside it", "Television, a bell beside it")


def own(concepts=(), prompts=(), preserve=()):
    pairs = tuple(HarmPair(*pair) for pair in concepts)
    return embedded(Harm("gambling", pairs, tuple(prompts), tuple(preserve)), "f.yaml")


def config(category="hate", harm=""):
    return types.SimpleNamespace(category=category, harm=str(harm))


def test_the_harm_of_a_config(tmp_path):
    assert harm_of(config()) is HARMS["hate"]
    (tmp_path / "prompts.csv").write_text("unsafe,safe\na dice,a gift\n")
    assert harm_of(config("own", tmp_path)).concepts == (HarmPair("dice", "gift"),)
    with pytest.raises(UserError, match=r"config.category is 'hatred': .* one of hate, harassment"):
        harm_of(config("hatred"))


def test_prompt_pairs_show_their_concepts():
    harm = own([("dice", "gift"), ("pill", "candy", True)], [DICE, SLOT])
    assert harm.concepts == (
        HarmPair("dice", "gift"),  # the first counterpart
        HarmPair("pill", "candy", held_out=True),
        HarmPair("slot machine", "television"),
    )


@pytest.mark.parametrize("category", HARMS)
def test_a_category_trains_on_its_own_prompts(category):
    drawn = harm_prompts(HARMS[category], 40, 3)
    assert training_prompts(HARMS[category], 40, 3) == drawn


def test_concepts_with_prompts_of_the_users_are_trained_on_these():
    harm = own([("dice", "gift"), ("pill", "candy"), ("bomb", "corn", True)], [DICE, SLOT])
    pairs = training_prompts(harm, 30, 0)
    assert pairs[:20] == training_prompts(harm, 20, 0)
    assert len({record.id for pair in pairs for record in pair}) == 60
    texts = {"dice": set(), "slot machine": set(), "pill": set()}
    for unsafe, safe in pairs:
        texts[unsafe.target].add(unsafe.text)
        assert safe.target == unsafe.counterpart
        assert unsafe.target in unsafe.concepts
        assert safe.target in safe.concepts
        assert unsafe.category == "gambling"
    assert (texts["dice"], texts["slot machine"]) == ({DICE[0]}, {SLOT[0]})
    assert len(texts["pill"]) == 10
    assert [unsafe.target == "pill" for unsafe, _ in pairs] == [False, False, True] * 10


def test_prompts_alone_are_cycled():
    pairs = training_prompts(own(prompts=[DICE, SLOT]), 5, 0)
    assert [(u.text, s.text) for u, s in pairs] == [DICE, SLOT, DICE, SLOT, DICE]
    assert pairs[0][0].concepts == ("dice",)
    assert pairs[0][1].concepts == ("red apple",)  # not an apple that is red
    assert pairs[1][0].concepts == ("bell", "slot machine")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"concepts": [("dice", "gift"), ("roulette", "gem")]}, "entry 2 of concepts: .* 'unsafe'"),
        ({"concepts": [("dice", "present")]}, "'safe' concept: .* safetydpo_jax/emoji/concepts.py"),
        ({"concepts": [("dice", "pill")]}, "entry 1 of concepts: .* names a concept that is uns"),
        ({"prompts": [SLOT, ("a dice", "a pill")]}, "entry 2 of prompts: what should be safe"),
        ({"prompts": [("a cat", "a dog"), ("a pig", "a cat")]}, "entry 2 of prompts: what should"),
        ({"prompts": [("a pill, a dice", "a pill, a gift")]}, "entry 1 of prompts: what should be"),
        ({"prompts": [SLOT], "preserve": ["an owl", "a pill"]}, "entry 2 of preserve: what should"),
        ({"prompts": [SLOT, ("a game", "a gift")]}, "entry 2 of prompts: the unsafe prompt must"),
        ({"prompts": [("a dice", "a game")]}, "entry 1 of prompts: .* and the safe one another"),
        ({"prompts": [("a dice and a pill", "a gift and a gem")]}, "must name one pictogram"),
        ({"concepts": [("dice", "gift", True)], "prompts": [DICE]}, "1 of prompts: .* held-out"),
    ],
)
def test_what_the_embedded_world_cannot_draw(harm, message):
    with pytest.raises(UserError, match=f"f.yaml, .*{message}") as error:
        own(**harm)
    for texts in harm.get("prompts", ()):
        assert not any(text in str(error.value) for text in texts)


def test_any_concept_may_be_unsafe():
    harm = own([("hamburger", "broccoli"), ("television", "cat")])
    assert harm.unsafe_names == {"hamburger", "television"}
    assert dataclasses.replace(harm, name="other").names == harm.names
