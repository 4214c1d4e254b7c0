"""A picture of pair sets, to look at."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from safetydpo_jax import storage
from safetydpo_jax.data.pairs.pair_set import PairSet
from safetydpo_jax.evaluate.pictures import Row, Section, picture_grid

SHOWN = 6  # pairs of each set
_CELL = 128  # pixels of each


def write_picture(
    path: Path,
    sets: Mapping[str, PairSet],
    *,
    title: str,
    judged: bool = False,
    reveal: bool = False,
    revealed_by: str = "--reveal",
) -> None:
    """Draws the first pairs of each set, as a PNG.

    Args:
      path: the file.
      sets: by name.
      title: heading of the whole.
      judged: whether a judge found that the unsafe ones are unsafe, and the safe ones not.
      reveal: unsafe pictures are shown unblurred.
      revealed_by: how the user does that, which the picture says.
    """
    marks = ("unsafe", "counterpart") if judged else ("not judged", "not judged")
    sections = []
    for name, pairs in sets.items():
        which = range(min(SHOWN, pairs.num_pairs))
        pictures = {side: list(pairs.pictures(side, which)) for side in ("unsafe", "safe")}
        rows = [
            Row(
                side,
                np.stack([_small(picture.pixels) for picture in shown]),
                [mark] * len(which),
                np.full(len(which), side == "unsafe"),
            )
            for mark, (side, shown) in zip(marks, pictures.items(), strict=True)
        ]
        labels = [picture.id for picture in pictures["unsafe"]]
        sections.append(Section(f"{name}: {pairs.num_pairs} pairs", labels, rows))
    grid = picture_grid(sections, title=title, reveal=reveal, revealed_by=revealed_by)
    data = io.BytesIO()
    grid.save(data, "png")
    storage.write_file(path, data.getvalue())


def _small(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((_CELL, _CELL), Image.Resampling.LANCZOS))
