"""Where pairs come from: prompts to draw, and a judge that says which drawings are good pairs."""

import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from safetydpo_jax.emoji.concepts import BUILT_IN, CATEGORY_OF
from safetydpo_jax.emoji.own_harm import harm_of, training_prompts
from safetydpo_jax.emoji.prompts import preserve_prompts
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import Harm, read_harm
from safetydpo_jax.storage import digest, hash_file

# Ways to show a concept, without articles: it may be one thing, several, or a doing.
WORDINGS = (
    "photo of {what}",
    "painting of {what}",
    "drawing of {what}",
    "{what} in a room",
    "{what} in the street",
    "close-up photo of {what}",
    "photo of {what} at night",
    "painting of {what} outdoors",
)
Pictures = UInt8[np.ndarray, "n H W 3"]
# (unsafe pictures, safe pictures, n prompt pairs) -> for each pair "" if it is good, or why it is
# dropped, in a few words that card.json counts.
Judge = Callable[[Pictures, Pictures, Sequence[tuple[Any, Any]]], list[str]]


class Prompt(Protocol):
    """What a prompt must have; a source's own records may say more to its judge."""

    @property
    def id(self) -> str:
        """Names the prompt without showing it."""
        ...

    @property
    def text(self) -> str:
        """The prompt; never printed."""
        ...


@dataclass(frozen=True)
class PairSource:
    """The three things that differ from one kind of pair to another.

    Attributes:
      name: with a version: changes whenever prompts or judge do.
      pairs: (count, seed) -> (unsafe, safe) prompts. A longer list begins with the shorter one.
      preserve: (count, seed) -> safe prompts besides, whose look training should keep.
      judge: says which pairs are good.
      num_prompts: pairs of prompts that there are, which come again after that; None: no end.
    """

    name: str
    pairs: Callable[[int, int], Sequence[tuple[Any, Any]]]
    preserve: Callable[[int, int], Sequence[Any]]
    judge: Judge
    num_prompts: int | None = None


@dataclass(frozen=True)
class PlainPrompt:
    """A prompt of the user's; see `Prompt`."""

    id: str
    text: str


def source_of(config: Any) -> PairSource:
    """The pairs of a config: of the embedded world, or of the user's words alone.

    Raises:
      UserError: a harm that cannot be, or a category that has prompts in the embedded world only.
    """
    if config.base == "emoji":
        return emoji_source(harm_of(config))
    if not config.harm:
        raise UserError(
            f"no prompts of {config.category} are shipped for {config.base}, so it cannot draw "
            f"pairs: {two_ways(config.base)}"
        )
    return plain_source(read_harm(config.harm))


def two_ways(base: str) -> str:
    """How to come by pairs for a model that draws more than pictograms; follows a colon."""
    return (
        "get CoProV2, the pair set published with SafetyDPO (arXiv 2412.10493, project page "
        "https://safetydpo.github.io/): it is not shipped, but a download, which safetydpo "
        "import_pairs makes pair sets of (launch/import_pairs.py, docs/pairs.md); or let the model "
        f"draw pairs of a harm of your own with safetydpo generate --config own:{base} "
        "--config.harm=FILE (launch/generate.py, docs/own_harm.md; safetydpo write_prompts has a "
        "language model write them)"
    )


def emoji_source(harm: Harm) -> PairSource:
    """The embedded world's: training prompts of a harm, judged by its detector.

    Args:
      harm: from `own_harm.harm_of`.
    """
    from safetydpo_jax.emoji import detector  # a network, which no other source needs

    own = "" if harm.name in BUILT_IN else f", harm {digest(asdict(harm))[:12]}"
    kept = len(harm.preserve)
    return PairSource(
        name=f"emoji, detector {hash_file(detector.WEIGHTS)[:12]}{own}",
        pairs=lambda count, seed: training_prompts(harm, count, seed),
        preserve=lambda count, seed: [
            *_preserved(harm, min(count, kept)),
            *preserve_prompts(harm, max(0, count - kept), seed),
        ],
        judge=detector_judge(
            detector.Detector.load().names, CATEGORY_OF.keys() | harm.unsafe_names
        ),
    )


def plain_source(harm: Harm) -> PairSource:
    """A harm's own words, in turn and again and again, for a model that knows them; unjudged.

    Concepts come in `WORDINGS`; held-out ones do not.
    """
    pairs = [
        (wording.format(what=pair.unsafe), wording.format(what=pair.safe))
        for wording in WORDINGS
        for pair in harm.concepts
        if not pair.held_out
    ]
    pairs += harm.prompts

    def drawn(count: int, seed: int) -> list[tuple[PlainPrompt, PlainPrompt]]:
        order = np.random.default_rng(seed).permutation(len(pairs))
        found = []
        for i in range(count):
            name, (unsafe, safe) = f"{harm.name}-{i:05d}", pairs[order[i % len(pairs)]]
            found.append((PlainPrompt(name, unsafe), PlainPrompt(f"{name}-safe", safe)))
        return found

    return PairSource(
        name=f"words of the user's, unjudged, harm {digest(asdict(harm))[:12]}",
        pairs=drawn,
        preserve=lambda count, seed: _preserved(harm, count if harm.preserve else 0),
        judge=lambda unsafe, safe, pairs: [""] * len(pairs),
        num_prompts=len(pairs),
    )


def _preserved(harm: Harm, count: int) -> list[PlainPrompt]:
    texts = itertools.islice(itertools.cycle(harm.preserve), count)
    return [PlainPrompt(f"{harm.name}-preserve-{i:05d}", text) for i, text in enumerate(texts)]


def detector_judge(
    names_of: Callable[[Pictures], Sequence[frozenset[str]]], unsafe_names: Set[str]
) -> Judge:
    """Keeps the pairs of which each picture shows its target, and the safe one no unsafe concept.

    Args:
      names_of: pictures -> the concepts that each shows.
      unsafe_names: the unsafe ones among them.
    """

    def judge(unsafe: Pictures, safe: Pictures, pairs: Sequence[tuple[Any, Any]]) -> list[str]:
        verdicts = []
        for shown, shown_safe, (harm, twin) in zip(
            names_of(unsafe), names_of(safe), pairs, strict=True
        ):
            if harm.target not in shown:
                verdicts.append("unsafe picture without its unsafe concept")
            elif twin.target not in shown_safe:
                verdicts.append("safe picture without the counterpart")
            elif shown_safe & unsafe_names:
                verdicts.append("safe picture with an unsafe concept")
            else:
                verdicts.append("")
        return verdicts

    return judge
