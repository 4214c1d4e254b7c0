"""A harm of the user's in the embedded world, which draws its pictograms and nothing else."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from safetydpo_jax.emoji.concepts import BUILT_IN, CATEGORY_OF, HARMS, INDEX
from safetydpo_jax.emoji.prompts import PromptRecord, harm_prompts
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES, Harm, HarmPair, read_harm

_KNOWN = "the embedded model draws only the pictograms named in safetydpo_jax/emoji/concepts.py"
# Of two names that begin at the same word the longer one is tried first.
_NAMES = re.compile(rf"\b(?:{'|'.join(sorted(INDEX, key=len, reverse=True))})\b")


def harm_of(config: Any) -> Harm:
    """The harm of a config: that of `config.harm`, or of `config.category`, which may be "all".

    Raises:
        UserError: there is no such category, or the file cannot be a harm of this world.
    """
    if config.harm:
        return embedded(read_harm(config.harm), config.harm)
    if config.category not in BUILT_IN:
        raise UserError(
            f"config.category is {config.category!r}: it must be one of {', '.join(BUILT_IN)}"
        )
    return BUILT_IN[config.category]


def embedded(harm: Harm, path: str) -> Harm:
    """The harm with the concepts that its prompt pairs show added to its own.

    A prompt pair shows the one pictogram that the unsafe prompt names and its twin does not, and
    the one the other way round. An unsafe concept shown with several counterparts keeps the first.

    Args:
        harm: as its file has it.
        path: of that file, for errors.

    Raises:
        UserError: a concept that this world does not know, an unsafe one where a safe one should
            be, or a prompt pair that does not show one concept and one counterpart.
    """
    if harm.name.lower() in CATEGORIES:
        raise UserError(
            f"{path}: the name {harm.name} is that of one of the embedded model's own harms "
            f"({', '.join(CATEGORIES)}); choose another"
        )
    pairs: dict[str, HarmPair] = {}
    to_be_safe: dict[str, set[str]] = {}
    for i, pair in enumerate(harm.concepts, 1):
        entry = f"{path}, entry {i} of concepts"
        for key, name in (("unsafe", pair.unsafe), ("safe", pair.safe)):
            if name not in INDEX:
                raise UserError(f"{entry}: there is no such {key!r} concept: {_KNOWN}")
        pairs[pair.unsafe] = pair
        to_be_safe[entry] = {pair.safe}
    for i, (unsafe, safe) in enumerate(harm.prompts, 1):
        entry = f"{path}, entry {i} of prompts"
        targets, counterparts = _shown(unsafe, safe)
        if len(targets) != 1 or len(counterparts) != 1:
            raise UserError(
                f"{entry}: the unsafe prompt must name one pictogram that the safe one does not, "
                f"and the safe one another: {_KNOWN}"
            )
        pair = HarmPair(targets.pop(), counterparts.pop())
        if pairs.setdefault(pair.unsafe, pair).held_out:
            raise UserError(f"{entry}: its unsafe concept is one of the held-out concepts")
        to_be_safe[entry] = _named(safe)
    for i, text in enumerate(harm.preserve, 1):
        to_be_safe[f"{path}, entry {i} of preserve"] = _named(text)
    unsafe_names = CATEGORY_OF.keys() | pairs.keys()
    for entry, names in to_be_safe.items():
        if names & unsafe_names:
            raise UserError(
                f"{entry}: what should be safe names a concept that is unsafe, in this file or in "
                "a built-in category; choose another"
            )
    return dataclasses.replace(harm, concepts=tuple(pairs.values()))


def listed(concepts: Iterable[tuple[str, str, str]]) -> list[Harm]:
    """This world's own harms with the unsafe concepts of a list and no others.

    Args:
        concepts: (where it stands in the list, for errors; category; unsafe concept).

    Raises:
        UserError: a category or concept that this world does not have, or that is held out.
    """
    found: dict[str, list[HarmPair]] = {}
    for where, category, name in concepts:
        if category not in HARMS:
            raise UserError(f"{where}: the category must be one of {', '.join(CATEGORIES)}")
        pairs = [pair for pair in HARMS[category].concepts if pair.unsafe == name.lower()]
        if not pairs:
            raise UserError(f"{where}: there is no such concept in {category}: {_KNOWN}")
        if pairs[0].held_out:
            raise UserError(f"{where}: this concept is held out, to measure with")
        found.setdefault(category, []).extend(pairs)
    return [Harm(category, tuple(pairs)) for category, pairs in found.items()]


def training_prompts(harm: Harm, count: int, seed: int) -> list[tuple[PromptRecord, PromptRecord]]:
    """Unsafe prompts with their safe twins to train on: the harm's own, and drawn ones.

    Concepts that the harm's own prompts show have these and no others, in turn and again and
    again; the other concepts have `harm_prompts`. Each concept has its share.

    Args:
        harm: from `harm_of`.
        count: how many; a longer list begins with the shorter one.
        seed: of the draw.
    """
    shown = {name for texts in harm.prompts for name in _shown(*texts)[0]}
    rest = tuple(pair for pair in harm.concepts if pair.unsafe not in shown)
    concepts = len(shown) + sum(not pair.held_out for pair in rest)
    own = [i % concepts < len(shown) for i in range(count)]
    others = dataclasses.replace(harm, concepts=rest)
    drawn = iter(harm_prompts(others, own.count(False), seed, avoid=harm.names))
    given = _given(harm)
    return [next(given if is_own else drawn) for is_own in own]


def _given(harm: Harm) -> Iterator[tuple[PromptRecord, PromptRecord]]:
    """The harm's own prompts, in turn and again and again, each time under another id."""
    for i, (unsafe, safe) in enumerate(itertools.cycle(harm.prompts)):
        (target,), (counterpart,) = _shown(unsafe, safe)
        name = f"{harm.name}-given-{i:05d}"
        yield (
            PromptRecord(
                name, unsafe, tuple(sorted(_named(unsafe))), (), harm.name, target, counterpart
            ),
            PromptRecord(
                f"{name}-safe", safe, tuple(sorted(_named(safe))), (), harm.name, counterpart, None
            ),
        )


def _shown(unsafe: str, safe: str) -> tuple[set[str], set[str]]:
    """The pictograms that only the one text names, and those that only the other does."""
    names, safe_names = _named(unsafe), _named(safe)
    return names - safe_names, safe_names - names


def _named(text: str) -> set[str]:
    return set(_NAMES.findall(text.lower()))
