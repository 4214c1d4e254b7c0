"""What a merge did, by groups of layers: lines for the screen and a picture."""

import collections
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from safetydpo_jax.evaluate.pictures import FAINT, INK, MARGIN, PAPER, font
from safetydpo_jax.merge.layer import Votes
from safetydpo_jax.merge.overlap import Overlap, Pairs

# Okabe & Ito's colours, which colour-blind readers can tell apart; then greys.
COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (86, 180, 233), (213, 94, 0), (240, 228, 66),
)  # fmt: skip
BAR, CELL, LABEL = 24, 64, 170


def group_of(layer: str) -> str:
    """The block that a layer is in: "down_blocks.1", "mid_block", "up_blocks.0"."""
    parts = layer.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def by_group(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over each group's layers, in the order of the UNet: down, mid, up."""
    groups = collections.defaultdict(list)
    for layer, value in values.items():
        groups[group_of(layer)].append(value)
    return {name: float(np.mean(groups[name])) for name in sorted(groups)}


def winners(votes: Mapping[str, Votes]) -> dict[str, Float[np.ndarray, " experts"]]:
    """By group, the share of the outputs that each expert wins."""
    groups: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for layer, found in votes.items():
        counts = np.bincount(found.outputs.argmax(0), minlength=len(found.outputs))
        groups[group_of(layer)].append(counts)
    totals = {name: np.sum(groups[name], 0) for name in sorted(groups)}
    return {name: total / total.sum() for name, total in totals.items()}


def lines(
    names: Sequence[str],
    energy: Mapping[str, float],
    error: Mapping[str, float],
    shares: Mapping[str, Float[np.ndarray, " experts"]] | None,
) -> list[str]:
    """A line a group: layers, energy that the rank kept, and who won which share of the outputs."""
    kept, off = by_group(energy), by_group(error)
    counts = collections.Counter(map(group_of, energy))
    width = max(map(len, kept))
    found = []
    for group, value in kept.items():
        line = f"  {group:{width}}  {counts[group]:3} layers  energy kept {100 * value:5.1f} %"
        if off[group] > 0:
            line += f" (the best may keep {100 * off[group]:.1f} more)"
        if shares and group in shares:
            ranked = sorted(zip(shares[group], names, strict=True), reverse=True)
            line += "  won by " + ", ".join(f"{name} {100 * share:.0f} %" for share, name in ranked)
        found.append(line)
    return found


def overlaps(names: Sequence[str], overlap: Overlap) -> list[str]:
    """The two experts that are the most alike, in a line; none of fewer than two."""
    if len(names) < 2:
        return []
    i, j = max(itertools.combinations(range(len(names)), 2), key=lambda ij: overlap.cosines[ij])
    return [
        f"most alike: {names[i]} and {names[j]}, cosine {overlap.cosines[i, j]:.2f}, "
        f"{100 * overlap.shared[i, j]:.0f} % of the outputs' directions in common"
    ]


def picture(
    title: str,
    names: Sequence[str],
    overlap: Overlap,
    shares: Mapping[str, Float[np.ndarray, " experts"]] | None,
) -> Image.Image:
    """Who won which share of each group's outputs, and how much the experts have in common."""
    groups = dict(shares or {})
    table = MARGIN + 70 + (len(groups) * (BAR + 8) + 100 if groups else 0)
    side = len(names) * CELL
    width = max(2 * MARGIN + LABEL + max(side, 520), 720)
    block = 60 + side + MARGIN
    canvas = Image.new("RGB", (width, table + 2 * block), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 24), title, INK, font(22))
    if groups:
        _bars(draw, names, groups, width)
    for i, (words, matrix) in enumerate(
        (
            ("Overlap: cosines of the experts' changes", overlap.cosines),
            ("Overlap: share of the outputs' directions in common", overlap.shared),
        )
    ):
        draw.text((MARGIN, table + i * block - 10), words, INK, font(16))
        _matrix(draw, names, matrix, table + i * block + 50)
    return canvas


def _bars(
    draw: ImageDraw.ImageDraw,
    names: Sequence[str],
    groups: Mapping[str, Float[np.ndarray, " experts"]],
    width: int,
) -> None:
    draw.text((MARGIN, 66), "Outputs won, per cent, by block", INK, font(16))
    length = width - 2 * MARGIN - LABEL
    for i, (group, share) in enumerate(groups.items()):
        y = 98 + i * (BAR + 8)
        draw.text((MARGIN, y + BAR // 2), group, INK, font(13), anchor="lm")
        ends = MARGIN + LABEL + np.rint(np.cumsum([0.0, *share]) * length).astype(int)
        for e, (left, right) in enumerate(itertools.pairwise(ends)):
            if right > left:
                draw.rectangle((left, y, right - 1, y + BAR), _colour(e))
            if right - left > 34:
                draw.text(
                    ((left + right) // 2, y + BAR // 2),
                    f"{100 * share[e]:.0f}",
                    _ink_on(_colour(e)),
                    font(12),
                    anchor="mm",
                )
    x, y = MARGIN + LABEL, 98 + len(groups) * (BAR + 8) + 8
    for e, name in enumerate(names):
        size = int(draw.textlength(name, font(13))) + 40
        if x + size > width - MARGIN:
            x, y = MARGIN + LABEL, y + 22
        draw.rectangle((x, y, x + 13, y + 13), _colour(e))
        draw.text((x + 20, y + 7), name, INK, font(13), anchor="lm")
        x += size


def _matrix(
    draw: ImageDraw.ImageDraw,
    names: Sequence[str],
    matrix: Pairs,
    top: int,
) -> None:
    for i, name in enumerate(names):
        y = top + i * CELL
        draw.text((MARGIN, y + CELL // 2), _short(name, 20), INK, font(13), anchor="lm")
        column = MARGIN + LABEL + i * CELL + CELL // 2
        draw.text((column, top - 12), _short(name, 8), FAINT, font(11), anchor="mm")
        for j in range(len(names)):
            x = MARGIN + LABEL + j * CELL
            value = float(matrix[i, j])
            fill = _shade(value)
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill)
            draw.text(
                (x + CELL // 2, y + CELL // 2),
                f"{value:.2f}",
                _ink_on(fill),
                font(13),
                anchor="mm",
            )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _colour(expert: int) -> tuple[int, int, int]:
    if expert < len(COLOURS):
        return COLOURS[expert]
    grey = 60 + 37 * (expert - len(COLOURS)) % 160
    return grey, grey, grey


def _shade(value: float) -> tuple[int, int, int]:
    """White at 0, blue towards 1, orange towards -1."""
    end = (0, 114, 178) if value >= 0 else (213, 94, 0)
    part = min(abs(value), 1.0)
    return tuple(round(255 + part * (e - 255)) for e in end)  # pyright: ignore[reportReturnType]


def _ink_on(fill: tuple[int, int, int]) -> tuple[int, int, int]:
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
    return INK if bright else PAPER
