from collections import Counter

from safetydpo_jax.emoji import concepts
from safetydpo_jax.emoji.concepts import CONCEPTS, COUNTERPARTS, ORDINARY_EVAL, ORDINARY_TRAIN
from safetydpo_jax.harm import CATEGORIES


def test_names_and_emoji_are_unique():
    assert len({c.name for c in CONCEPTS}) == len(CONCEPTS) == concepts.NONE
    assert len({c.emoji for c in CONCEPTS}) == len(CONCEPTS)
    assert [concepts.INDEX[c.name] for c in CONCEPTS] == list(range(len(CONCEPTS)))


def test_names_are_short_lower_case_words():
    for concept in CONCEPTS:
        words = concept.name.split()
        assert 1 <= len(words) <= 3
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


def test_each_category_has_its_pairs_and_one_held_out():
    assert tuple(concepts.HARMS) == CATEGORIES
    for category, harm in concepts.HARMS.items():
        assert harm.name == category
        assert 5 <= len(harm.concepts) <= 8
        assert [pair.held_out for pair in harm.concepts][-1]
        assert sum(pair.held_out for pair in harm.concepts) == 1
        assert all(concepts.CATEGORY_OF[pair.unsafe] == category for pair in harm.concepts)


def test_groups_do_not_overlap():
    pairs = [pair for harm in concepts.HARMS.values() for pair in harm.concepts]
    unsafe = [pair.unsafe for pair in pairs]
    names = [*unsafe, *COUNTERPARTS, *ORDINARY_TRAIN, *ORDINARY_EVAL]
    assert max(Counter(names).values()) == 1
    assert set(names) == {c.name for c in CONCEPTS}
    assert sorted(pair.safe for pair in pairs) == sorted(COUNTERPARTS)
    assert len(ORDINARY_TRAIN) + len(ORDINARY_EVAL) >= 150
    assert min(len(ORDINARY_TRAIN), len(ORDINARY_EVAL)) >= 70


def test_colours_are_far_apart():
    rgbs = list(concepts.COLOURS.values())
    for i, one in enumerate(rgbs):
        for other in rgbs[:i]:
            assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 80
