"""Draws the sprite sheet of the embedded world from the Noto Color Emoji font.

Maintainers run it when the concepts change; users never need it, the sheet is shipped. The font is
Debian's package fonts-noto-color-emoji:

    apt-get install fonts-noto-color-emoji
    python launch/build_artwork.py
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw, ImageFont

from safetydpo_jax.emoji.artwork import CELL, SHEET, cell_box, sheet_size
from safetydpo_jax.emoji.concepts import CONCEPTS, Concept
from safetydpo_jax.errors import UserError, run_main

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109  # the font's only bitmap size
EMOJI_STYLE = "\N{VARIATION SELECTOR-16}"


def draw_glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """The glyph on a transparent ground, cropped to its visible pixels."""
    canvas = Image.new("RGBA", (3 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 2, STRIKE // 4), text, font=font, embedded_color=True)
    return canvas.crop(canvas.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def fit(glyph: Image.Image) -> Image.Image:
    """Scales the glyph so that its longer side fills a cell, and centres it."""
    scale = CELL / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    small = glyph.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(small.convert("RGBA"), ((CELL - width) // 2, (CELL - height) // 2))
    return cell


def build(font_path: str, concepts: tuple[Concept, ...]) -> Image.Image:
    """The sprite sheet of the concepts, in their order.

    Raises:
        UserError: no such font, or a glyph it lacks or draws like another concept's.
    """
    if not Path(font_path).is_file():
        raise UserError(f"{font_path}: no such font; apt-get install fonts-noto-color-emoji")
    font = ImageFont.truetype(font_path, STRIKE)
    missing = draw_glyph(font, "\U0010ffff").tobytes()
    sheet = Image.new("RGBA", sheet_size())
    seen: dict[str, str] = {}
    for index, concept in enumerate(concepts):
        glyph = draw_glyph(font, concept.emoji + EMOJI_STYLE)
        digest = hashlib.sha256(glyph.tobytes()).hexdigest()
        if glyph.tobytes() == missing or max(glyph.size) > 1.3 * STRIKE:
            raise UserError(f"'{concept.name}' ({concept.emoji}): the font has no single glyph")
        if digest in seen:
            raise UserError(f"'{concept.name}' is drawn exactly like '{seen[digest]}'")
        seen[digest] = concept.name
        sheet.paste(fit(glyph), cell_box(index)[:2])
    return sheet


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", default=FONT, help=f"default {FONT}")
    parser.add_argument("--out", default=str(SHEET), help="default: the package's own sheet")
    args = parser.parse_args()
    build(args.font, CONCEPTS).save(args.out, optimize=True)
    size = Path(args.out).stat().st_size / 2**20
    print(f"wrote {len(CONCEPTS)} pictograms to {args.out} ({size:.2f} MiB)")


if __name__ == "__main__":
    run_main(main)
