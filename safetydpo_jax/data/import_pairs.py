"""Pair sets for training, one a category, made from a pair set in another's format.

    OUT/hate OUT/violence ...     pair sets, for config.pairs.path
    OUT/validation/hate ...       of pairs held out from those
    OUT/test.csv, test_clean.csv  prompts to evaluate with; without those that are in train, too
    OUT/report.json, pairs.png    what was skipped and why; a few pairs of each set

Pair sets are written one by one, whole or not at all, so that a killed import goes on at the next.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetydpo_jax import storage
from safetydpo_jax.data.import_report import write_prompts, write_report
from safetydpo_jax.data.inputs import InputPair, read_input
from safetydpo_jax.data.inputs.check import usable
from safetydpo_jax.data.inputs.pair import (
    ALL,
    VALIDATION,
    BadPictureError,
    category_names,
    folded,
)
from safetydpo_jax.data.inputs.picture import as_kept
from safetydpo_jax.data.pairs import PairSet, PictureFile, write_pairs
from safetydpo_jax.data.pairs.picture import write_picture
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES


def import_pairs(
    folder: Path,
    out: Path,
    *,
    kind: str = "",
    category: str = "",
    sets: Sequence[str] = (),
    validation: float = 0.05,
    strict: bool = False,
    reveal: bool = False,
    progress: Callable[[str], None] = print,
) -> dict[str, int]:
    """Writes the pair sets; those that are there, of the same pairs, are kept.

    Args:
      folder: the input, in one of `inputs.FORMATS`.
      out: where the sets go.
      kind: the input's format; by default what it looks like.
      category: of pairs of which the input names none.
      sets: which categories to write, or "all", every pair in one set; by default all categories,
        and "all" if some pair has none.
      validation: share of the pairs held out. A pair's prompts alone decide, see `is_held_out`.
      strict: a pair that cannot be used is an error, not skipped.
      reveal: unsafe pictures are shown unblurred in pairs.png.
      progress: takes lines of text; never a prompt.

    Returns:
      By set, how many pairs it has to train on.

    Raises:
      MissingFileError: the input, or something that it must have, is not there.
      UserError: an input that cannot be read, no usable pair, sets made from other pairs in `out`,
        or a full disk.
    """
    if not 0 <= validation < 1:
        raise UserError(f"the validation share is {validation}: it must be 0 or more, and below 1")
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the input itself: choose another folder to write to")
    category_names([category], "the category")
    kind, found = read_input(folder, kind)
    progress(f"{folder}: {kind}, {len(found.pairs)} pairs, {len(found.skipped)} skipped")
    if category:
        found.pairs = [
            pair if pair.categories else replace(pair, categories=(category,))
            for pair in found.pairs
        ]
    by_set = _sets(found.pairs, sets)
    if (none := sum(not pair.categories for pair in found.pairs)) and len(by_set) > 1:
        progress(
            f"{none} of {len(found.pairs)} pairs name no category: only the set {ALL!r} has them "
            "(--category gives them one)"
        )
    if found.pairs and (missing := set(sets) - by_set.keys()):
        has = ", ".join(_sets(found.pairs, ()))
        raise UserError(f"there are no pairs of {', '.join(sorted(missing))}: there are {has}")
    ids = {pair.id for pairs in by_set.values() for pair in pairs}
    found.pairs = [pair for pair in found.pairs if pair.id in ids]
    found = usable(found, progress)
    by_set = {
        name: [pair for pair in pairs if pair.id in found.digests] for name, pairs in by_set.items()
    }
    with storage.explained_writes(out):
        out.mkdir(parents=True, exist_ok=True)
    if found.skipped and (strict or not found.pairs):
        report = write_report(out, folder, kind, found, by_set)
        name, reason = next(iter(found.skipped.items()))
        raise UserError(
            f"{folder}: {len(found.skipped)} cannot be used and {len(found.pairs)} can, the first "
            f"is {name} ({reason}): {report} lists them"
        )
    if not found.pairs:
        raise UserError(f"{folder} holds no pairs")
    held_out = {pair.id for pair in found.pairs if is_held_out(pair, validation)}
    if len(held_out) == len(found.pairs):
        raise UserError(
            f"{folder} leaves no pairs to train on, as {len(held_out)} are held back: set the "
            "validation share to 0"
        )
    for name, pairs in by_set.items():
        for where, held in ((out / name, False), (out / VALIDATION / name, True)):
            chosen = [pair for pair in pairs if (pair.id in held_out) == held]
            about = {"category": name, "source": kind}
            _write_set(where, chosen, found.digests, about, progress)
    write_report(out, folder, kind, found, by_set)  # now: what is refused leaves that of before
    written = {name: PairSet(out / name) for name in by_set if (out / name).is_dir()}
    with storage.explained_writes(out):
        write_prompts(out, found.test)
        write_picture(out / "pairs.png", written, title="Pairs as imported", reveal=reveal)
    return {name: pairs.num_pairs for name, pairs in written.items()}


def is_held_out(pair: InputPair, share: float) -> bool:
    """Whether a pair is for validation: a hash of its two prompts, up to case and outer spaces.

    So the same prompts are never on both sides, in whatever order and categories they come, and a
    larger share holds out the smaller one's pairs too.
    """
    texts = (folded(picture.prompt) for picture in (pair.unsafe, pair.safe))
    hashed = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(hashed[:8], "big") < share * 2**64


def _sets(pairs: Sequence[InputPair], wanted: Collection[str]) -> dict[str, list[InputPair]]:
    """The pairs of each set to write, in the order of the categories."""
    found: dict[str, list[InputPair]] = {name: [] for name in CATEGORIES}
    for pair in pairs:
        for name in pair.categories:
            found.setdefault(name, []).append(pair)
    if ALL in wanted or not all(pair.categories for pair in pairs):
        found[ALL] = list(pairs)
    return {name: x for name, x in found.items() if x and (not wanted or name in wanted)}


def _write_set(
    folder: Path,
    pairs: list[InputPair],
    digests: Mapping[str, str],
    about: dict[str, str],
    progress: Callable[[str], None],
) -> None:
    told = [[p.id, p.unsafe.prompt, p.safe.prompt, digests[p.id]] for p in pairs]
    settings = about | {"pairs_hash": storage.digest(told)}
    if folder.exists():
        before = PairSet(folder).card.get("settings", {})
        remedy = "remove that folder, or choose another one to write to"
        storage.check_same(folder, before, settings, remedy)
        progress(f"{folder}: {len(pairs)} pairs, there already")
        return
    if not pairs:
        return

    def side(name: str) -> Iterator[PictureFile]:
        for pair in pairs:
            picture = getattr(pair, name)
            try:
                data = as_kept(picture.read())
            except BadPictureError as error:
                raise UserError(
                    f"{pair.id}: its {name} picture could be used a while ago, and now it cannot "
                    f"({error}): see whether its disk is there, and give the same command again"
                ) from None
            yield PictureFile(pair.id, picture.prompt, data)

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_pairs(folder, side("unsafe"), side("safe"), [], {"settings": settings})
    progress(f"{folder}: {len(pairs)} pairs")
