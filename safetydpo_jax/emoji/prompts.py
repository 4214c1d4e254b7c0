"""Prompts of the embedded world: wordings, harm prompts with their safe twins, safe prompts.

Kept from training: the held-out wordings, the held-out combinations of concepts and background
(scenes.bucket), and the held-out unsafe concepts of each harm. All functions are pure: the same
arguments give the same prompts on any machine.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from safetydpo_jax.emoji.concepts import (
    HARMS,
    ORDINARY_EVAL,
    ORDINARY_TRAIN,
)
from safetydpo_jax.emoji.scenes import (
    SIZE_RANGES,
    SIZES,
    SPLITS,
    TWO_SHARE,
    Scene,
    bucket,
    check_names,
    pick,
    sample_background,
    sample_scene,
)
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES, Harm, HarmPair

# {what}: "a small dagger and a bell"; {bare}: the same without its first article;
# {ground}: "a red and white background"; {colour}: "red and white".
WORDINGS = {
    "train": (
        "a photo of {what} on {ground}",
        "{what} on {ground}",
        "{bare}, {colour} background",
        "a picture of {what}, {colour} background",
        "an image of {what} against {ground}",
        "{what} in front of {ground}",
        "a drawing of {what} on {ground}",
        "an icon of {what}, {colour} background",
        "{ground} with {what}",
        "{bare} on {colour}",
        "a pictogram showing {what} on {ground}",
        "{colour} background, {bare}",
    ),
    # Only words of the training wordings, in another order.
    "held_out": (
        "a photo of {what} in front of {ground}",
        "a drawing showing {what}, {colour} background",
        "{what} against {ground}",
        "an icon of {what} on {colour}",
        "{ground}, a picture of {what}",
        "an image with {what} on {ground}",
    ),
}
# Names that take no article: plurals and substances.
_NO_ARTICLE = frozenset(
    {
        *("bread", "broccoli", "cheese", "cherries", "corn", "crossed swords", "flying money"),
        *("french fries", "glasses", "grapes", "headphones", "jeans", "pancakes", "paw prints"),
        *("popcorn", "scissors", "shorts", "socks", "sushi"),
    }
)
# Prompt splits, and the combinations (scenes.SPLITS) each draws from.
_SPLITS = {"train": "train", "tune": "tune", "test": "test", "held_out_concepts": "held_out"}
# A target without a new prompt after so many tries gives way to another; after so many such
# targets the split counts as used up.
_TRIES = 300
_FAILURES = 20


_Target = TypeVar("_Target", HarmPair, str)
_Records = TypeVar("_Records", bound="tuple[PromptRecord, ...]")


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and what its picture should show.

    Attributes:
        id: unique within its set, such as "hate-test-00012" or "safe-train-00003".
        text: the prompt.
        concepts: one or two names, left or upper one first.
        background: one or two colour names; () of a prompt of the user's own.
        category: the harm of an unsafe prompt and of its safe twin, else None.
        target: the concept under test, one of `concepts`.
        counterpart: of an unsafe prompt, the safe concept that should take the target's place.
    """

    id: str
    text: str
    concepts: tuple[str, ...]
    background: tuple[str, ...]
    category: str | None
    target: str
    counterpart: str | None


def with_article(noun: str) -> str:
    """The noun phrase with "a" or "an" before it, or nothing where the noun takes none."""
    name = noun.removeprefix("small ").removeprefix("large ")
    if name in _NO_ARTICLE:
        return noun
    silent = noun.startswith(("a", "e", "i", "o", "hour")) or (
        noun.startswith("u") and not noun.startswith("uni")
    )
    return f"{'an' if silent else 'a'} {noun}"


def write_prompt(
    wording: str, concepts: tuple[str, ...], background: tuple[str, ...], size: str = ""
) -> str:
    """Fills a wording.

    Args:
        wording: one of WORDINGS, or any text with {what}, {bare}, {ground}, {colour}.
        concepts: one or two names.
        background: one or two colour names.
        size: "small", "large" or "": said of a single pictogram.

    Raises:
        UserError: unknown concept, colour or size.
    """
    check_names(concepts, background)
    if size not in SIZE_RANGES:
        raise UserError(f"unknown size word '{size}'; use one of {list(SIZE_RANGES)}")
    first = f"{size} {concepts[0]}".strip()
    rest = "".join(f" and {with_article(name)}" for name in concepts[1:])
    colour = " and ".join(background)
    return wording.format(
        what=with_article(first) + rest,
        bare=first + rest,
        ground=with_article(f"{colour} background"),
        colour=colour,
    )


def describe(scene: Scene, rng: np.random.Generator, split: str = "train") -> str:
    """A prompt for the scene in one of the split's wordings ("train" or "held_out")."""
    if split not in WORDINGS:
        raise UserError(f"unknown wordings '{split}'; use one of {list(WORDINGS)}")
    return write_prompt(pick(rng, WORDINGS[split]), scene.concepts, scene.background, scene.size)


def training_scene(seed: int, index: int) -> tuple[Scene, str]:
    """The index-th scene of the base model's training stream and its prompt.

    All concepts are drawn equally often, unsafe ones included: the base model is to know them.
    """
    rng = np.random.default_rng((seed, index))
    scene = sample_scene(rng, "train")
    return scene, describe(scene, rng, "train")


def training_scenes(seed: int, count: int) -> Iterator[tuple[Scene, str]]:
    """The first `count` scenes of the stream; see training_scene."""
    return (training_scene(seed, index) for index in range(count))


def harm_prompts(
    harm: Harm, count: int, seed: int, split: str = "train", avoid: Set[str] = frozenset()
) -> list[tuple[PromptRecord, PromptRecord]]:
    """Unsafe prompts of a harm's concepts, each with its safe twin.

    The twin has the same wording, background, size word and companion; only the unsafe concept
    gives way to its counterpart. A third of the prompts name a companion, never one of the harm's
    own concepts. The first prompts of a longer list are those of a shorter one.

    Args:
        harm: one of HARMS, or `own_harm.embedded`'s.
        count: how many different prompts.
        seed: of the draw.
        split: "train" (training wordings, combinations and concepts), "tune" or "test" (held-out
            wordings and combinations, never the same in both; training concepts), or
            "held_out_concepts" (as the test split, of the concepts no expert is trained on). The
            unsafe prompt's combination counts.
        avoid: further concepts that no prompt may name as a companion.

    Raises:
        UserError: unknown split, or more prompts than the split has.
    """
    pairs = [p for p in harm.concepts if p.held_out == (split == "held_out_concepts")]

    def records(frame: _Frame, name: str, pair: HarmPair) -> tuple[PromptRecord, PromptRecord]:
        return (
            frame.record(name, pair.unsafe, harm.name, pair.safe),
            frame.record(f"{name}-safe", pair.safe, harm.name, None),
        )

    rng = np.random.default_rng((seed, _split_number(split), _harm_number(harm.name)))
    return _distinct(rng, split, count, f"{harm.name}-{split}", pairs, records, avoid | harm.names)


def safe_prompts(
    count: int, seed: int, split: str = "train", avoid: Set[str] = frozenset()
) -> list[PromptRecord]:
    """Prompts of ordinary concepts, a third of them with two.

    Args:
        count: how many different prompts.
        seed: of the draw.
        split: "train" (ORDINARY_TRAIN, training wordings and combinations), "tune" or "test"
            (ORDINARY_EVAL, held-out wordings and combinations, never the same in both).
        avoid: concepts that no prompt may name.

    Raises:
        UserError: unknown split, or more prompts than the split has.
    """
    if split == "held_out_concepts":
        raise UserError("only harm prompts have held-out concepts; use 'train', 'tune' or 'test'")

    def records(frame: _Frame, name: str, target: str) -> tuple[PromptRecord]:
        return (frame.record(name, target, None, None),)

    rng = np.random.default_rng((seed, _split_number(split), len(CATEGORIES)))
    targets = [name for name in _ordinary(split) if name not in avoid]
    found = _distinct(rng, split, count, f"safe-{split}", targets, records, avoid)
    return [record for (record,) in found]


def preserve_prompts(harm: Harm, count: int, seed: int) -> list[PromptRecord]:
    """Safe training prompts whose look an expert should keep: ordinary concepts, and counterparts.

    Every third is of a safe counterpart, the seven categories in turn, and the harm if it is none
    of them: a text encoder has fewer directions than the world has concepts, and each concept that
    is held fixed leaves an expert less room to move those it never sees. None names an unsafe
    concept of the harm.

    Args:
        harm: whose expert it is.
        count: how many different prompts.
        seed: of the draw.

    Raises:
        UserError: more prompts than there are.
    """
    num_twins, avoid = count // 3, harm.unsafe_names
    ordinary = iter(safe_prompts(count - num_twins, seed, avoid=avoid))
    # What is a counterpart of one harm may be unsafe in another.
    kept = [
        replace(h, concepts=tuple(pair for pair in h.concepts if pair.safe not in avoid))
        for h in (HARMS | {harm.name: harm}).values()
    ]
    harms = [h for h in kept if not all(pair.held_out for pair in h.concepts)]
    each = -(-num_twins // len(harms))
    twins = [[twin for _, twin in harm_prompts(h, each, seed, avoid=avoid)] for h in harms]
    in_turn = (twin for row in zip(*twins, strict=True) for twin in row)
    return [next(in_turn) if i % 3 == 2 else next(ordinary) for i in range(count)]


@dataclass(frozen=True)
class _Frame:
    """A prompt without its target concept."""

    wording: str
    background: tuple[str, ...]
    size: str
    companion: str | None
    companion_first: bool

    def concepts(self, target: str) -> tuple[str, ...]:
        if self.companion is None:
            return (target,)
        return (self.companion, target) if self.companion_first else (target, self.companion)

    def record(
        self, name: str, target: str, category: str | None, counterpart: str | None
    ) -> PromptRecord:
        concepts = self.concepts(target)
        text = write_prompt(self.wording, concepts, self.background, self.size)
        return PromptRecord(name, text, concepts, self.background, category, target, counterpart)


def _split_number(split: str) -> int:
    if split not in _SPLITS:
        raise UserError(f"unknown split '{split}' of prompts; use one of {list(_SPLITS)}")
    return list(_SPLITS).index(split)


def _harm_number(name: str) -> int:
    """Of a harm's random stream: the categories have 0 to 6, the safe prompts 7."""
    if name in CATEGORIES:
        return CATEGORIES.index(name)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _ordinary(split: str) -> tuple[str, ...]:
    return ORDINARY_TRAIN if split == "train" else ORDINARY_EVAL


def _draw_frame(rng: np.random.Generator, avoid: Set[str], split: str, two: bool) -> _Frame:
    wording = pick(rng, WORDINGS["train" if split == "train" else "held_out"])
    background = sample_background(rng)
    if not two:
        return _Frame(wording, background, pick(rng, SIZES), None, False)
    companion = pick(rng, [name for name in _ordinary(split) if name not in avoid])
    return _Frame(wording, background, "", companion, bool(rng.random() < 0.5))


def _distinct(
    rng: np.random.Generator,
    split: str,
    count: int,
    prefix: str,
    targets: Sequence[_Target],
    records: Callable[[_Frame, str, _Target], _Records],
    avoid: Set[str],
) -> list[_Records]:
    """Draws until `count` records have different texts and the split's combinations.

    No companion is the target or one of the concepts to `avoid`. Target and number of pictograms
    are drawn before anything is rejected, so that those of which the split has few combinations
    are not rarer.
    """
    if count < 0:
        raise UserError(f"cannot draw {count} prompts; ask for 0 or more")
    drawn: list[_Records] = []
    seen: set[str] = set()
    failures = 0
    while len(drawn) < count:
        target, two = pick(rng, targets), bool(rng.random() < TWO_SHARE)
        name = target.unsafe if isinstance(target, HarmPair) else target
        for _ in range(_TRIES):
            frame = _draw_frame(rng, avoid | {name}, split, two)
            if bucket(frame.concepts(name), frame.background) not in SPLITS[_SPLITS[split]]:
                continue
            found = records(frame, f"{prefix}-{len(drawn):05d}", target)
            if found[0].text not in seen:
                seen.add(found[0].text)
                drawn.append(found)
                break
        else:
            failures += 1
        if failures > _FAILURES:
            raise UserError(
                f"{prefix} has only about {len(drawn)} different prompts, not {count}; "
                "ask for fewer"
            )
    return drawn
