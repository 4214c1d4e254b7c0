"""Several pair sets read as one: those in the folders of one folder, as an import leaves them."""

import itertools
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from safetydpo_jax import storage
from safetydpo_jax.data.inputs.pair import ALL
from safetydpo_jax.data.pairs.pair_set import PairSet, Picture
from safetydpo_jax.errors import UserError
from safetydpo_jax.remote import open_folder, reading


class JoinedPairs:
    """The pair sets of a folder, one after the other by name, without "all", which has theirs.

    Attributes:
      folder: which has them.
      card: as of a pair set, of all together.
      parts: how many pairs come from each.

    Args:
      folder: whose folders are pair sets.
      verify: as of `PairSet`.

    Raises:
      MissingFileError, UserError: as `PairSet`, of any of them.
    """

    def __init__(self, folder: str | PurePath, *, verify: bool = False):
        self.folder = open_folder(folder)
        with reading(self.folder):
            cards = list(self.folder.glob(f"*/{storage.CARD}"))
        names = sorted({file.parent.name for file in cards} - {ALL})
        self._sets = {name: PairSet(self.folder / name, verify=verify) for name in names}
        self.parts = {name: pairs.num_pairs for name, pairs in self._sets.items()}
        self.num_pairs = sum(self.parts.values())
        self.num_preserve = sum(pairs.num_preserve for pairs in self._sets.values())
        told = {name: pairs.card for name, pairs in self._sets.items()}
        sources = {str(card.get("settings", {}).get("source", "unknown")) for card in told.values()}
        self.card: dict[str, Any] = {
            "content_hash": storage.digest({n: card["content_hash"] for n, card in told.items()}),
            "num_pairs": self.num_pairs,
            "num_preserve": self.num_preserve,
            "settings": {"category": ", ".join(names), "source": ", ".join(sorted(sources))},
        }

    @property
    def sizes(self) -> dict[str, int]:
        """How many pictures each split has."""
        each = [pairs.sizes for pairs in self._sets.values()]
        return {split: sum(sizes[split] for sizes in each) for split in each[0]}

    def pictures(self, split: str, which: range | None = None) -> Iterator[Picture]:
        """Pictures of a split in order; as of a `PairSet`."""
        which = range(self.sizes[split]) if which is None else which
        ends = itertools.accumulate(pairs.sizes[split] for pairs in self._sets.values())
        for pairs, end in zip(self._sets.values(), ends, strict=True):
            first, size = end - pairs.sizes[split], pairs.sizes[split]
            start, stop = (min(max(x - first, 0), size) for x in (which.start, which.stop))
            yield from pairs.pictures(split, range(start, stop))


def open_pairs(folder: str | PurePath, *, verify: bool = False) -> PairSet | JoinedPairs:
    """The pair set in a folder, or those in its folders joined, or its `all` if it has no other.

    Of a run's folder, that which the run drew.

    Raises:
      MissingFileError, UserError: there is none, or one is damaged.
    """
    found = open_folder(folder)
    with reading(found):
        is_set = (found / storage.CARD).is_file()
        if not is_set and (found / "pairs").is_dir():
            return open_pairs(found / "pairs", verify=verify)
        inside = set() if is_set else {file.parent.name for file in found.glob(f"*/{storage.CARD}")}
    if inside == {ALL}:
        return PairSet(found / ALL, verify=verify)
    return (JoinedPairs if inside else PairSet)(found, verify=verify)


def mixing_weights(parts: dict[str, int], given: tuple[str, ...]) -> list[float]:
    """The weights of the parts of a joined set.

    Args:
      parts: how many pairs each has, by name.
      given: "NAME=X", of those whose weight is not 1.

    Raises:
      UserError: no such part, no number above 0, or no parts at all.
    """
    weights = dict.fromkeys(parts, 1.0)
    for text in given:
        name, _, value = text.partition("=")
        if name not in weights:
            has = f"it has {', '.join(parts)}" if parts else "it is one set"
            raise UserError(f"config.mix: the pairs have no set {name!r}: {has}")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = 0.0
        if not 0 < weights[name] < float("inf"):
            raise UserError(f"config.mix has {text!r}: write a number above 0, as in '{name}=2'")
    return list(weights.values())
