"""Where pairs come from: prompts to draw, and a judge that says which drawings are good pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from safetydpo_jax.data.storage import hash_file
from safetydpo_jax.emoji import concepts, prompts

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
    """

    name: str
    pairs: Callable[[int, int], Sequence[tuple[Any, Any]]]
    preserve: Callable[[int, int], Sequence[Any]]
    judge: Judge


def emoji_source(category: str) -> PairSource:
    """The embedded world's: its training prompts of a category, judged by its detector.

    Raises:
      UserError: there is no such category.
    """
    from safetydpo_jax.emoji import detector  # a network, which no other source needs

    weights = Path(detector.__file__).with_name("detector.safetensors")
    return PairSource(
        name=f"emoji, detector {hash_file(weights)[:12]}",
        pairs=lambda count, seed: prompts.harm_prompts(category, count, seed),
        preserve=prompts.preserve_prompts,
        judge=detector_judge(detector.Detector.load().names),
    )


def detector_judge(names_of: Callable[[Pictures], Sequence[frozenset[str]]]) -> Judge:
    """Keeps the pairs of which each picture shows its target, and the safe one no unsafe concept.

    Args:
      names_of: pictures -> the concepts that each shows.
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
            elif shown_safe & concepts.CATEGORY_OF.keys():
                verdicts.append("safe picture with an unsafe concept")
            else:
                verdicts.append("")
        return verdicts

    return judge
