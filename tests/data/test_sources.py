import types

import numpy as np
import pytest

from safetydpo_jax.data.sources import detector_judge, emoji_source, plain_source, source_of
from safetydpo_jax.emoji import concepts, own_harm, prompts
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import Harm, HarmPair

FOOD = own_harm.embedded(
    Harm("food", (HarmPair("hamburger", "owl"),), (("a cat", "a dog"),), ("a beach", "a hill")), ""
)


def test_judge_wants_the_concept_and_its_counterpart():
    pair = prompts.harm_prompts(concepts.HARMS["hate"], 1, seed=0)[0]
    harm, safe = pair[0].target, pair[1].target
    other, unsafe_too = concepts.ORDINARY_TRAIN[0], concepts.HARMS["violence"].concepts[0].unsafe
    cases = {
        ((harm,), (safe,)): "",
        ((harm, other), (other, safe)): "",
        ((), (safe,)): "unsafe picture without its unsafe concept",
        ((safe,), (safe,)): "unsafe picture without its unsafe concept",
        ((harm,), (other,)): "safe picture without the counterpart",
        ((harm,), (safe, harm)): "safe picture with an unsafe concept",
        ((harm,), (safe, unsafe_too)): "safe picture with an unsafe concept",
    }
    shown = iter([[frozenset(names[side]) for names in cases] for side in (0, 1)])
    judge = detector_judge(lambda pictures: next(shown), concepts.CATEGORY_OF.keys())
    pictures = np.zeros((len(cases), 64, 64, 3), np.uint8)
    assert judge(pictures, pictures, [pair] * len(cases)) == list(cases.values())


def test_a_harm_of_the_users_in_the_embedded_world():
    source, hate = emoji_source(FOOD), emoji_source(concepts.HARMS["hate"])
    assert source.name.startswith(f"{hate.name}, harm ")
    more = Harm("food", (*FOOD.concepts, HarmPair("pig", "fox", held_out=True)))
    assert emoji_source(more).name != source.name  # the judge differs
    assert source.pairs(6, 0) == own_harm.training_prompts(FOOD, 6, 0)
    preserved = source.preserve(5, 0)
    assert [r.text for r in preserved[:2]] == ["a beach", "a hill"]
    assert preserved[2:] == prompts.preserve_prompts(FOOD, 3, 0)
    assert len({r.id for r in preserved}) == 5
    assert source.preserve(1, 0) == preserved[:1]


def test_its_unsafe_concepts_spoil_a_safe_picture():
    found = {0: frozenset({"hamburger"}), 1: frozenset({"owl", "cat"})}
    judge = detector_judge(lambda p: [found[int(p[0, 0, 0, 0])]], FOOD.unsafe_names)
    pair = own_harm.training_prompts(FOOD, 2, 0)[1]
    pictures = [np.full((1, 8, 8, 3), i, np.uint8) for i in (0, 1)]
    assert judge(*pictures, [pair]) == ["safe picture with an unsafe concept"]


def test_words_alone_for_other_models():
    harm = Harm(
        "guns",
        (HarmPair("gun", "banana"), HarmPair("tank", "tractor", held_out=True)),
        (("a duel", "a dance"), ("a war", "a fair")),
        ("a beach", "a hill"),
    )
    source = plain_source(harm)
    pairs = source.pairs(25, 3)
    assert pairs[:4] == source.pairs(4, 3)
    texts = [(unsafe.text, safe.text) for unsafe, safe in pairs]
    assert len(set(texts[:10])) == len(set(texts)) == 10  # eight wordings and two prompts
    assert texts[10:20] == texts[:10]
    assert {("a duel", "a dance"), ("a war", "a fair")} < set(texts)
    assert ("photo of gun", "photo of banana") in texts
    assert not any("tank" in text for text, _ in texts)
    assert len({prompt.id for pair in pairs for prompt in pair}) == 50
    assert [prompt.text for prompt in source.preserve(3, 0)] == ["a beach", "a hill", "a beach"]
    assert plain_source(Harm("guns", harm.concepts)).preserve(3, 0) == []
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    assert source.judge(pictures, pictures, pairs[:2]) == ["", ""]
    assert "unjudged" in source.name
    assert plain_source(Harm("guns", harm.concepts)).name != source.name


def test_the_source_of_a_config(tmp_path):
    (tmp_path / "prompts.csv").write_text("unsafe,safe\na dice,a gift\n")

    def name(base, harm, category="hate"):
        return source_of(types.SimpleNamespace(base=base, harm=harm, category=category)).name

    assert name("emoji", "") == emoji_source(concepts.HARMS["hate"]).name
    assert name("emoji", str(tmp_path)).startswith("emoji, detector ")
    assert "unjudged" in name("sd15", str(tmp_path))
    message = r"no prompts of hate are shipped for sd21.* CoProV2.* --config own:sd21 --config.harm"
    with pytest.raises(UserError, match=message):
        name("sd21", "")
