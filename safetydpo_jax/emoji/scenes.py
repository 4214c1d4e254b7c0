"""Scenes of the embedded world: what is in a picture, and how it is drawn.

A Scene holds every number its picture depends on, so that `render` is a pure function of it. Which
(concepts, background) combinations are kept from training follows from their names alone.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from safetydpo_jax.emoji.artwork import CELL, sprites
from safetydpo_jax.emoji.concepts import COLOURS, CONCEPTS, HARMS, INDEX
from safetydpo_jax.errors import UserError

SIDE = 64  # px, width and height of a picture
TWO_SHARE = 1 / 3  # of scenes show two pictograms
TWO_TONE_SHARE = 0.4  # of backgrounds have two colours
# Longer side of a single pictogram in px, by its size word ("" is no word), and of one of two.
SIZE_RANGES = {"small": (26, 34), "": (36, 46), "large": (46, 56)}
TWO_SIZE_RANGE = (24, 30)
SIZES = ("small", "", "", "large")  # no word is twice as frequent

# Of 100 buckets of combinations: those seen by training, and those kept for the other splits.
SPLITS = {
    "tune": range(0, 5),
    "test": range(5, 15),
    "held_out": range(0, 15),
    "train": range(15, 100),
}
_COLOUR_NAMES = tuple(COLOURS)
_PARTNER = {pair.safe: pair.unsafe for harm in HARMS.values() for pair in harm.concepts}
_Option = TypeVar("_Option")
# Prescaled sprites: each is at most 1.2 times the next, so that bicubic sampling does not alias.
_LEVELS = (24, 29, 35, 42, 50, 60, CELL)
_MARGIN = 2  # px of transparency around a prescaled sprite, so that its border is smooth
_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5 - SIDE / 2


@dataclass(frozen=True)
class Placement:
    """Where one pictogram is: centre (x, y) and longer side in px, tilt in degrees clockwise."""

    x: float
    y: float
    size: float
    tilt: float


@dataclass(frozen=True)
class Boundary:
    """The line between two background colours.

    Attributes:
        angle: direction from the first colour to the second, degrees clockwise from rightwards.
        offset: distance of the line from the picture's centre along that direction, px.
    """

    angle: float
    offset: float


@dataclass(frozen=True)
class Scene:
    """Everything one picture shows.

    Attributes:
        concepts: one or two names, left or upper one first.
        background: one or two colour names, upper one first, or the left one.
        size: "small", "" (not said) or "large"; always "" for two pictograms.
        placements: one per concept.
        boundary: where two background colours meet, None for one colour.
    """

    concepts: tuple[str, ...]
    background: tuple[str, ...]
    size: str
    placements: tuple[Placement, ...]
    boundary: Boundary | None


def bucket(concepts: tuple[str, ...], background: tuple[str, ...]) -> int:
    """The bucket, 0 to 99, of a combination: a stable hash of names, whatever their order.

    A counterpart counts as its unsafe partner, so that both scenes of a pair fall together.
    """
    names = sorted(_PARTNER.get(name, name) for name in concepts)
    key = "|".join([*names, "on", *sorted(background)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100


def check_split(split: str) -> range:
    """The split's buckets; raises UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}' of the emoji world; use one of {list(SPLITS)}")
    return SPLITS[split]


def check_names(concepts: tuple[str, ...], background: tuple[str, ...]) -> None:
    """Raises UserError unless these are one or two different known concepts and colours."""
    for kind, names, known in (("concept", concepts, INDEX), ("colour", background, COLOURS)):
        if len(names) not in (1, 2) or len(set(names)) != len(names):
            raise UserError(f"a scene has one {kind} or two different ones, not {list(names)}")
        for name in names:
            if name not in known:
                raise UserError(f"unknown {kind} '{name}' in a scene; see emoji/concepts.py")


def pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    """One of the options, each equally often (much faster than rng.choice on a short list)."""
    return options[int(rng.integers(len(options)))]


def sample_background(rng: np.random.Generator) -> tuple[str, ...]:
    """One colour name, or two different ones in TWO_TONE_SHARE of the draws."""
    first = pick(rng, _COLOUR_NAMES)
    if rng.random() >= TWO_TONE_SHARE:
        return (first,)
    return first, pick(rng, [name for name in _COLOUR_NAMES if name != first])


def sample_scene(
    rng: np.random.Generator, split: str = "train", concepts: tuple[str, ...] | None = None
) -> Scene:
    """Draws a scene whose combination belongs to the split.

    Args:
        rng: source of every choice.
        split: "train", "tune", "test" or "held_out" (tune and test together).
        concepts: the names to show, left or upper one first; None draws one or two of all
            concepts, each equally often.

    Raises:
        UserError: unknown split or concept.
    """
    buckets = check_split(split)
    if concepts is not None:
        check_names(concepts, ("red",))
    while True:
        names = concepts
        if names is None:
            names = (pick(rng, CONCEPTS).name,)
            if rng.random() < TWO_SHARE:
                names += (pick(rng, [c for c in CONCEPTS if c.name != names[0]]).name,)
        background = sample_background(rng)
        if bucket(names, background) in buckets:
            break
    size = pick(rng, SIZES) if len(names) == 1 else ""
    return arrange(rng, names, background, size)


def arrange(
    rng: np.random.Generator, concepts: tuple[str, ...], background: tuple[str, ...], size: str = ""
) -> Scene:
    """Draws places, sizes in px, tilts and the background's boundary for a given content."""
    check_names(concepts, background)
    if size not in SIZE_RANGES or (size and len(concepts) == 2):
        raise UserError(
            f"size '{size}' of a scene of {len(concepts)}: use one of {list(SIZE_RANGES)} for one "
            "pictogram, '' for two"
        )
    if len(concepts) == 1:
        longer = rng.uniform(*SIZE_RANGES[size])
        x, y = rng.uniform(longer / 2, SIDE - longer / 2, size=2)
        placements = (Placement(float(x), float(y), longer, rng.uniform(-15, 15)),)
    else:
        # Side by side, or along one of the diagonals; the columns never overlap.
        level, slope = rng.uniform(-10, 10), 0.0
        if rng.random() < 0.5:
            level, slope = rng.uniform(-2, 2), pick(rng, (-14.0, 14.0))
        placements = tuple(
            Placement(
                SIDE / 2 + side * 15.5 + rng.uniform(-0.5, 0.5),
                float(SIDE / 2 + level + side * slope + rng.uniform(-2, 2)),
                rng.uniform(*TWO_SIZE_RANGE),
                rng.uniform(-10, 10),
            )
            for side in (-1, 1)
        )
    boundary = None
    if len(background) == 2:
        # The first colour is left, upper left, upper, or upper right.
        boundary = Boundary(pick(rng, (0.0, 45.0, 90.0, 135.0)), rng.uniform(-8, 8))
    return Scene(concepts, background, size, placements, boundary)


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """Draws the picture, sRGB. The same scene always gives the same pixels."""
    canvas = draw_background(scene.background, scene.boundary)
    for name, place in zip(scene.concepts, scene.placements, strict=True):
        sprite = np.asarray(_place_sprite(INDEX[name], place), np.float32)
        canvas *= 1 - sprite[..., 3:] / 255
        canvas += sprite[..., :3]
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def draw_background(background: tuple[str, ...], boundary: Boundary | None) -> np.ndarray:
    """The background alone, (SIDE, SIDE, 3) float32 in 0..255, edge smoothed over two px."""
    first = np.array(COLOURS[background[0]], np.float32)
    if boundary is None:
        return np.broadcast_to(first, (SIDE, SIDE, 3)).copy()
    second = np.array(COLOURS[background[1]], np.float32)
    angle = math.radians(boundary.angle)
    distance = math.cos(angle) * _COLUMNS + math.sin(angle) * _ROWS - boundary.offset
    share = np.clip(distance / 2 + 0.5, 0, 1)[..., None]
    return first + share * (second - first)


@cache
def _prescaled(index: int, level: int) -> Image.Image:
    """The sprite at `level` px with a transparent margin, premultiplied."""
    canvas = Image.new("RGBa", (level + 2 * _MARGIN, level + 2 * _MARGIN))
    small = sprites()[index].resize((level, level), Image.Resampling.LANCZOS)
    canvas.paste(small, (_MARGIN, _MARGIN))
    return canvas


def _place_sprite(index: int, place: Placement) -> Image.Image:
    """The sprite scaled, tilted and moved to its place on a transparent SIDE x SIDE picture."""
    level = next((level for level in _LEVELS if level >= place.size), CELL)
    scale, tilt = level / place.size, math.radians(place.tilt)
    a, b = scale * math.cos(tilt), scale * math.sin(tilt)
    centre = level / 2 + _MARGIN
    # PIL wants the map from a pixel of the result to one of the sprite.
    inverse = (
        *(a, b, centre - a * place.x - b * place.y),
        *(-b, a, centre + b * place.x - a * place.y),
    )
    return _prescaled(index, level).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC
    )
