"""The shipped sprite sheet: one RGBA picture per concept."""

from functools import cache
from pathlib import Path

from PIL import Image

from safetydpo_jax.emoji.concepts import CONCEPTS
from safetydpo_jax.errors import MissingFileError, UserError

SHEET = Path(__file__).parent / "artwork.png"
CELL = 72  # px; the longer side of every pictogram fills its cell
COLUMNS = 16


def sheet_size() -> tuple[int, int]:
    """Width and height in px of a sheet that holds every concept."""
    return COLUMNS * CELL, -(-len(CONCEPTS) // COLUMNS) * CELL


def cell_box(index: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in px of the concept's cell, rows first."""
    left, top = index % COLUMNS * CELL, index // COLUMNS * CELL
    return left, top, left + CELL, top + CELL


def load_sheet(path: str | Path = SHEET) -> tuple[Image.Image, ...]:
    """Reads the sprites in the order of CONCEPTS.

    Args:
        path: a PNG written by launch/build_artwork.py.

    Returns:
        One CELL x CELL picture per concept, mode "RGBa" (colour premultiplied by alpha).

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no picture, of another size, or has an empty cell.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"{path}: the sprite sheet is missing; reinstall the package or run "
            "launch/build_artwork.py"
        )
    try:
        with Image.open(path) as file:
            sheet = file.convert("RGBA")
    except OSError as error:
        raise UserError(
            f"{path}: not a readable picture ({error}); run launch/build_artwork.py again"
        ) from error
    if sheet.size != sheet_size():
        raise UserError(
            f"{path}: {sheet.size[0]}x{sheet.size[1]} px where {len(CONCEPTS)} concepts need "
            f"{sheet_size()[0]}x{sheet_size()[1]}; run launch/build_artwork.py again"
        )
    sprites = tuple(sheet.crop(cell_box(i)).convert("RGBa") for i in range(len(CONCEPTS)))
    for concept, sprite in zip(CONCEPTS, sprites, strict=True):
        if sprite.getbbox() is None:
            raise UserError(
                f"{path}: the cell of '{concept.name}' is empty; run launch/build_artwork.py again"
            )
    return sprites


@cache
def sprites() -> tuple[Image.Image, ...]:
    """The shipped sprites, read once; see load_sheet."""
    return load_sheet()
