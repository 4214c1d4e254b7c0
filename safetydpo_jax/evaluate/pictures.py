"""Grids of pictures: the same prompts and noise, drawn by the base model and by an expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from safetydpo_jax.errors import UserError

# What a picture counts as -> its frame. The word stands under the picture as well, so that the
# colour carries nothing alone. Colours: Okabe & Ito's, which colour-blind readers can tell apart.
MARKS = {
    "unsafe": (213, 94, 0),
    "counterpart": (0, 158, 115),
    "as prompted": (0, 114, 178),
    "other": (230, 159, 0),
    "junk": (130, 130, 130),
    "not judged": (190, 190, 190),
}
CELL, FRAME, GAP, MARGIN, SIDE, CAPTION = 112, 4, 14, 36, 84, 18
ROW = CELL + CAPTION + GAP // 2
INK, FAINT, PAPER = (28, 32, 38), (110, 116, 124), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """One model's pictures of a section's n prompts.

    Attributes:
        name: stands beside the row, on several lines if it has line breaks.
        pictures: one a prompt.
        marks: what each of them counts as, a key of `MARKS`.
        hide: which of them are blurred unless the grid is revealed.
    """

    name: str
    pictures: UInt8[np.ndarray, "n H W 3"]
    marks: Sequence[str]
    hide: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Section:
    """One block of the grid: n prompts as columns, and under each other who drew them.

    Attributes:
        title: heading of the block.
        labels: short ids of the prompts, never their text.
        rows: from the top.
    """

    title: str
    labels: Sequence[str]
    rows: Sequence[Row]


def blurred(picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """The picture averaged to 4 x 4 patches and smoothed: only its colours are left of it."""
    height, width = picture.shape[:2]
    patches = Image.fromarray(picture).resize((4, 4), Image.Resampling.BOX)
    smooth = patches.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth.filter(ImageFilter.GaussianBlur(width / 8)))


def picture_grid(
    sections: Sequence[Section],
    *,
    title: str,
    subtitle: str = "",
    reveal: bool = False,
    revealed_by: str = "report.reveal=true",
) -> Image.Image:
    """Lays the sections out under each other, with title, legend, row names and verdicts.

    Args:
        sections: the blocks, from the top.
        title: heading of the whole.
        subtitle: a line under it.
        reveal: show the pictures that are hidden otherwise.
        revealed_by: what the user sets for that.

    Raises:
        UserError: no pictures, or lists of different lengths in a section.
    """
    if not sections:
        raise UserError("a picture grid needs at least one section")
    for section in sections:
        counts = {"labels": len(section.labels)}
        for row in section.rows:
            counts |= {f"{row.name} {k}": len(v) for k, v in vars(row).items() if k != "name"}
        if len(set(counts.values())) != 1 or not (section.labels and section.rows):
            raise UserError(f"grid section {section.title!r} has lists of unequal length: {counts}")
    columns = max(len(section.labels) for section in sections)
    tops = np.cumsum([140, *(64 + len(section.rows) * ROW for section in sections)]).tolist()
    width = max(2 * MARGIN + SIDE + columns * (CELL + GAP) - GAP, 720)
    canvas = Image.new("RGB", (width, tops[-1] + 10 + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 28), title, INK, font(26))
    draw.text((MARGIN, 66), subtitle, FAINT, font(14))
    _legend(draw, 96, sections, "" if reveal else revealed_by)
    for section, top in zip(sections, tops[:-1], strict=True):
        _draw_section(canvas, draw, section, top, reveal)
    return canvas


def _draw_section(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, section: Section, top: int, reveal: bool
) -> None:
    draw.line((MARGIN, top, canvas.width - MARGIN, top), (224, 226, 230))
    draw.text((MARGIN, top + 12), section.title, INK, font(17))
    for column, label in enumerate(section.labels):
        x = MARGIN + SIDE + column * (CELL + GAP)
        draw.text((x + CELL // 2, top + 50), _fit(label, 11, CELL), FAINT, font(11), anchor="mm")
    for i, row in enumerate(section.rows):
        y = top + 60 + i * ROW
        size = 13 if "\n" in row.name else 15
        draw.text((MARGIN, y + CELL // 2), row.name, INK, font(size), anchor="lm")
        for column, (picture, mark) in enumerate(zip(row.pictures, row.marks, strict=True)):
            x = MARGIN + SIDE + column * (CELL + GAP)
            hidden = bool(row.hide[column]) and not reveal
            image = Image.fromarray(blurred(picture) if hidden else picture)
            inner = CELL - 2 * FRAME
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), MARKS[mark])
            canvas.paste(
                image.resize((inner, inner), Image.Resampling.LANCZOS), (x + FRAME, y + FRAME)
            )
            centre = (x + CELL // 2, y + CELL + CAPTION // 2)
            draw.text(centre, mark, FAINT, font(12), anchor="mm")


def _legend(
    draw: ImageDraw.ImageDraw, top: int, sections: Sequence[Section], revealed_by: str
) -> None:
    rows = [row for section in sections for row in section.rows]
    used = {mark for row in rows for mark in row.marks}
    x = MARGIN
    for mark, colour in MARKS.items():
        if mark in used:
            draw.rectangle((x, top + 4, x + 13, top + 17), outline=colour, width=FRAME)
            draw.text((x + 20, top + 11), mark, INK, font(13), anchor="lm")
            x += int(20 + draw.textlength(mark, font(13)) + 22)
    if revealed_by and any(row.hide.any() for row in rows):
        note = f"unsafe pictures are blurred; set {revealed_by} to see them"
        draw.text((x, top + 11), note, FAINT, font(13), anchor="lm")


def _fit(text: str, size: int, width: int) -> str:
    """The text, its middle left out if it is wider than `width` pixels (ids differ at the end)."""
    face = font(size)
    short, cut = text, 0
    while face.getlength(short) > width:
        cut += 1
        kept = len(text) - cut
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The one that all pictures are lettered in, `size` pixels high."""
    return ImageFont.load_default(size)
