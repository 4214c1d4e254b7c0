"""Pictures that show no concept, one kind a function: what the detector must call "none".

They stand for the ways in which a picture model fails: noise, nothing drawn, two things at once,
blobs. `degrade` is the opposite: a picture still good, as an autoencoder gives it back.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from safetydpo_jax.emoji.scenes import (
    SIDE,
    Boundary,
    Scene,
    draw_background,
    pick,
    render,
    sample_background,
    sample_scene,
)

Picture = UInt8[np.ndarray, "64 64 3"]
_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def noise(rng: np.random.Generator) -> Picture:
    """Noise around a random colour, from fine grain to blotches, of any strength."""
    field = _field(rng, pick(rng, (4, 8, 16, 32, SIDE, SIDE)), rng.uniform(20, 120))
    return _to_picture(field + rng.uniform(60, 200, 3))


def blank(rng: np.random.Generator) -> Picture:
    """A background of one or two colours with nothing on it, a little shaded and grainy."""
    background = sample_background(rng)
    boundary = Boundary(rng.uniform(0, 180), rng.uniform(-20, 20)) if len(background) == 2 else None
    shade = _field(rng, 4, rng.uniform(0, 12)) + _field(rng, SIDE, rng.uniform(0, 8))
    return _to_picture(draw_background(background, boundary) + shade)


def blend(rng: np.random.Generator) -> Picture:
    """The pixel average of two scenes that share no concept."""
    first, second = _two_scenes(rng)
    if rng.random() < 0.5:
        second = dataclasses.replace(second, placements=first.placements)
    share = rng.uniform(0.4, 0.6)
    return _to_picture(share * render(first).astype(np.float32) + (1 - share) * render(second))


def crossfade(rng: np.random.Generator) -> Picture:
    """A concept that turns into another across its middle, so that about half of each is drawn."""
    while True:
        first, other = _two_scenes(rng, count=1)
        place = first.placements[0]
        second = dataclasses.replace(first, concepts=other.concepts)
        angle = rng.uniform(0, 2 * np.pi)
        across = np.cos(angle) * (_COLUMNS - place.x) + np.sin(angle) * (_ROWS - place.y)
        share = np.clip(across / (rng.uniform(0.1, 0.5) * place.size) + 0.5, 0, 1)[..., None]
        ground = draw_background(first.background, first.boundary)
        one, two = render(first) - ground, render(second) - ground
        if _is_half(one, 1 - share) and _is_half(two, share):
            return _to_picture(ground + (1 - share) * one + share * two)


def smear(rng: np.random.Generator) -> Picture:
    """A scene whose pixels are dragged along a smooth random flow, then softened."""
    picture = render(sample_scene(rng))
    flow = _field(rng, pick(rng, (7, 10, 14)), rng.uniform(8, 12))
    rows = np.clip(_ROWS + flow[..., 0], 0, SIDE - 1).astype(np.intp)
    columns = np.clip(_COLUMNS + flow[..., 1], 0, SIDE - 1).astype(np.intp)
    return _blur(picture[rows, columns], rng.uniform(0.5, 2.5))


def heavy_blur(rng: np.random.Generator) -> Picture:
    """A scene blurred until only blobs of colour are left."""
    scene = sample_scene(rng)
    return _blur(render(scene), scene.placements[0].size * rng.uniform(0.14, 0.3))


def shuffled(rng: np.random.Generator) -> Picture:
    """A scene cut into patches of 8 px that are put back in a random order."""
    patches = render(sample_scene(rng)).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)
    mixed = rng.permutation(patches).reshape(8, 8, 8, 8, 3).swapaxes(1, 2)
    return np.ascontiguousarray(mixed.reshape(SIDE, SIDE, 3))


JUNK: dict[str, Callable[[np.random.Generator], Picture]] = {
    kind.__name__: kind for kind in (noise, blank, blend, crossfade, smear, heavy_blur, shuffled)
}


def degrade(picture: Picture, rng: np.random.Generator, strength: float = 1.0) -> Picture:
    """Mild blur, noise and colour shift, as after an autoencoder of about 30 dB at strength 1."""
    soft = _blur(picture, rng.uniform(0, 0.9) * strength).astype(np.float32)
    gain = 1 + strength * rng.uniform(-0.06, 0.06)
    shift = strength * (rng.uniform(-8, 8, 3) + _field(rng, SIDE, rng.uniform(0, 6)))
    return _to_picture(soft * gain + shift + _field(rng, 16, strength * rng.uniform(0, 5)))


def _two_scenes(rng: np.random.Generator, count: int | None = None) -> tuple[Scene, Scene]:
    """Two scenes of as many pictograms as each other that share none."""
    while True:
        first, second = sample_scene(rng), sample_scene(rng)
        alike = len(first.concepts) == len(second.concepts) and count in (None, len(first.concepts))
        if alike and not set(first.concepts) & set(second.concepts):
            return first, second


def _is_half(drawn: np.ndarray, share: np.ndarray) -> bool:
    """Whether the share leaves 0.35 to 0.65 of what is drawn on a background."""
    visible = np.abs(drawn)
    return bool(0.35 < (visible * share).sum() / visible.sum() < 0.65)


def _field(rng: np.random.Generator, side: int, deviation: float) -> np.ndarray:
    """Gaussian noise of (SIDE, SIDE, 3) that is smooth over SIDE / side px."""
    grid = rng.standard_normal((3, side, side), np.float32) * deviation
    if side == SIDE:
        return np.moveaxis(grid, 0, -1)
    planes = (Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in grid)
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _blur(picture: Picture, sigma: float) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def _to_picture(values: np.ndarray) -> Picture:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)
