"""The pair factory: the model to be aligned draws its own winners and losers.

For each pair the base model draws the unsafe prompt and its safe twin from the same initial noise
(SafetyDPO, arXiv 2412.10493, section 3); a judge drops the pairs that do not show what they should.

Pictures are drawn in chunks of one batch, each kept when it is done. Which chunks a set takes is
decided by what the judge says of those before, and a picture depends on nothing but its prompt and
its seed: so a killed run, or several processes that share the folder, end with the same set.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safetydpo_jax.data.inputs.pair import ALL
from safetydpo_jax.data.pairs import JoinedPairs, PairSet, open_pairs
from safetydpo_jax.data.pending import Chunk, PendingPairs, State, check_options
from safetydpo_jax.data.sources import PairSource, source_of
from safetydpo_jax.diffusion.samplers import draw_pictures
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.pace import Pace

SYMBOLS = "emoji"  # the embedded model, and the first word of what its pictures' sources are


def make_pairs(
    config: Any,
    pipeline: Any,
    workdir: str | Path,
    progress: Callable[[str], None] = print,
    source: PairSource | None = None,
) -> Path:
    """Draws, judges and writes the pair set of a category to `workdir`/pairs, unless it is there.

    Args:
      config: as of `PendingPairs`; with `pairs.path` the pair set made before is taken instead.
      pipeline: the base model, a `models.pretrained.Pipeline`.
      workdir: the run's folder.
      progress: is told, in a sentence, how far it is; never a prompt.
      source: prompts and judge; by default `source_of(config)`.

    Returns:
      The pair set's folder, for `pairs.open_pairs`.

    Raises:
      UserError: as `PendingPairs`, or the pairs are another category's.
    """
    check_options(config)  # of drawing too: the report draws, whoever made the pairs
    if config.pairs.path:
        pairs = open_pairs(config.pairs.path)
        check_pairs(config, pairs)
        category = _category_of(pairs) or "category unknown"
        progress(f"pairs: {pairs.num_pairs} ({category}) from {pairs.folder}")
        return pairs.folder
    pairs = PendingPairs(config, pipeline, Path(workdir) / "pairs", source or source_of(config))
    draw_all([pairs], pipeline, progress)
    return pairs.finish(progress)


def check_pairs(config: Any, pairs: PairSet | JoinedPairs) -> None:
    """Refuses another world's pairs, and another category's: files would say what is not so.

    Raises:
      UserError: they are.
    """
    source = str(pairs.card.get("settings", {}).get("source", ""))
    symbols = f"{SYMBOLS}, " in source
    if symbols and config.base != SYMBOLS:
        raise UserError(
            f"{pairs.folder} has pictograms that the embedded model drew, and the config is for "
            f"{config.base}: give pairs of such pictures (docs/pairs.md)"
        )
    if source not in ("", "unknown") and not symbols and config.base == config.model == SYMBOLS:
        raise UserError(
            f"{pairs.folder} has pairs from {source}, and the config is for the embedded model of "
            "pictograms: give --config NAME:sd15, NAME:sd21 or NAME:sdxl"
        )
    given = [name for name in list(pairs.parts) or [_category_of(pairs)] if name]
    if config.category in CATEGORIES and given == [ALL]:
        raise UserError(
            f"{pairs.folder} has pairs of any category, and this expert is of {config.category}: "
            "give the folder of that beside it; pairs that name no category get one by --category "
            "of launch/import_pairs.py"
        )
    # What one set calls its own may be the same harm by another name; of several, one is meant.
    others = [
        name for name in given if name != config.category and (pairs.parts or name in CATEGORIES)
    ]
    if others and config.category != ALL:
        raise UserError(
            f"{pairs.folder} has pairs of {', '.join(others)}, and this expert is of "
            f"{config.category}: "
            + (
                f"give --config.pairs.path={pairs.folder}/{config.category}"
                if config.category in given
                else "give pairs of that, or the config of these"
            )
        )


def _category_of(pairs: PairSet | JoinedPairs) -> str | None:
    return pairs.card.get("settings", {}).get("category")


def draw_all(
    sets: Sequence[PendingPairs],
    pipeline: Any,
    progress: Callable[[str], None] = print,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Draws the chunks that pair sets lack, as many at a time as the pipeline has devices.

    Args:
      sets: with the same options of drawing.
      pipeline: the base model.
      progress: is told what is done, at what rate, and the time left.
      part: (i, n): every n-th chunk from the i-th on is this process's. When these are done it
        helps with the others', from the last on: it waits for no process, and may be the only one
        that is left.

    Raises:
      UserError: a set of which no pair passes, a model that draws NaN, a part that cannot be, or a
        full disk.
    """
    if not sets:
        raise UserError("there is no set of pairs to draw")
    index, count = part
    if not 0 <= index < count:
        raise UserError(f"part {index} of {count}: parts are numbered from 0")
    for leftover in (folder for pairs in sets for folder in pairs.leftovers):
        progress(f"pairs: {leftover} was drawn with other settings; it goes when the set is done")
    pace, before = Pace(1), _total(sets)
    while True:
        missing = [(i, pairs, chunk) for i, pairs in enumerate(sets) for chunk in pairs.missing()]
        if (pace.due(0) or not missing) and (total := _total(sets)).wanted:
            progress(_told(total, pace.rate(total.pictures - before.pictures)))
        if not missing:
            return
        mine = [(p, chunk) for i, p, chunk in missing if (i + chunk.number) % count == index]
        _draw(
            (mine or [(p, chunk) for _, p, chunk in missing[::-1]])[: pipeline.num_devices],
            pipeline,
        )


def _draw(chosen: Sequence[tuple[PendingPairs, Chunk]], pipeline: Any) -> None:
    """Draws a chunk for each device, judges and keeps them."""
    texts = [text for _, chunk in chosen for text in chunk.texts]
    seeds = np.concatenate([chunk.seeds for _, chunk in chosen])
    pictures = draw_pictures(pipeline, texts, seeds, **chosen[0][0].options)
    for (pairs, chunk), drawn in zip(chosen, np.split(pictures, len(chosen)), strict=True):
        pairs.keep(chunk, drawn)


def _total(sets: Sequence[PendingPairs]) -> State:
    return State(*map(sum, zip(*(pairs.state() for pairs in sets), strict=True)))


def _told(total: State, rate: float) -> str:
    said = f"pairs: {total.drawn} drawn, {total.kept} kept, {total.wanted} wanted"
    if total.others_wanted:
        said += f"; {total.others} of {total.others_wanted} preservation pictures"
    if rate:
        pairs_left = (total.wanted - total.kept) * total.drawn / max(1, total.kept)
        left = 2 * pairs_left + total.others_wanted - total.others
        said += f"; {rate:.1f} pictures/s, {left / rate:.0f} s left"
    return said
