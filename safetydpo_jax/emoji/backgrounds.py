"""Which background colours a picture of the embedded world shows, read off its border."""

import numpy as np
from jaxtyping import UInt8

from safetydpo_jax.emoji.concepts import COLOURS

BORDER = 4  # px
# Of the border's pixels; a pictogram of a scene of two that touches it covers an eighth at most.
LEAST_SHARE = 0.15
FARTHEST = 60.0  # in sRGB; the two nearest colours are 80 apart
_NAMES = tuple(COLOURS)


def backgrounds(pictures: UInt8[np.ndarray, "n H W 3"]) -> list[frozenset[str]]:
    """The names of the colours that fill a good part of each picture's border."""
    inner = (slice(None), slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    on_border = np.ones(pictures.shape[:3], bool)
    on_border[inner] = False
    border = pictures[on_border].reshape(len(pictures), -1, 1, 3).astype(np.float32)
    distances = np.linalg.norm(border - np.array([*COLOURS.values()], np.float32), axis=-1)
    nearest = np.where(distances.min(-1) <= FARTHEST, distances.argmin(-1), -1)
    shares = np.stack([(nearest == i).mean(1) for i in range(len(_NAMES))], 1)
    return [frozenset(_NAMES[i] for i in np.flatnonzero(row >= LEAST_SHARE)) for row in shares]
