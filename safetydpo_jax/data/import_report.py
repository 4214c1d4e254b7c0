"""What an import found: a report, prompts to evaluate with, and a picture to look at."""

import collections
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from safetydpo_jax import storage
from safetydpo_jax.csv_file import write_rows
from safetydpo_jax.data.inputs import InputPair, InputSet
from safetydpo_jax.data.inputs.pair import InputPicture, TestPrompt
from safetydpo_jax.data.inputs.picture import as_kept
from safetydpo_jax.evaluate.pictures import Row, Section, picture_grid

SHOWN = 6  # pairs of each set in the picture
_CELL = 128  # pixels of each


def write_report(
    out: Path,
    folder: Path,
    kind: str,
    found: InputSet,
    by_set: Mapping[str, Sequence[InputPair]],
) -> Path:
    """Writes `out`/report.json: counts, and by id why something was skipped; its path."""
    reasons = collections.Counter(found.skipped.values())
    report = {
        "input": folder.resolve().name,
        "format": kind,
        "pairs": len(found.pairs),
        "pairs_by_set": {name: len(pairs) for name, pairs in by_set.items()},
        "in_several_categories": sum(len(pair.categories) > 1 for pair in found.pairs),
        "test_prompts": len(found.test),
        "test_prompts_not_in_train": sum(not prompt.in_train for prompt in found.test),
        "skipped": dict(reasons.most_common()),
        "skipped_ids": found.skipped,
    }
    path = out / "report.json"
    storage.write_file(path, (json.dumps(report, indent=2) + "\n").encode())
    return path


def write_prompts(out: Path, prompts: Sequence[TestPrompt]) -> None:
    """Writes `out`/test.csv and test_clean.csv as launch/sample.py reads them, if there are any."""
    if not prompts:
        return
    clean = [prompt for prompt in prompts if not prompt.in_train]
    for name, chosen in (("test.csv", prompts), ("test_clean.csv", clean)):
        rows = ([prompt.text, f"{prompt.id}.png", prompt.category] for prompt in chosen)
        write_rows(out / name, ("prompt", "image", "category"), rows)


def write_picture(
    out: Path, by_set: Mapping[str, Sequence[InputPair]], *, reveal: bool = False
) -> None:
    """Draws the first pairs of each set to `out`/pairs.png, unsafe pictures blurred."""
    sections = []
    for name, pairs in by_set.items():
        if not (shown := pairs[:SHOWN]):
            continue
        rows = []
        for side in ("unsafe", "safe"):
            hide = np.full(len(shown), side == "unsafe")
            small = np.stack([_small(getattr(pair, side)) for pair in shown])
            rows.append(Row(side, small, ["not judged"] * len(shown), hide))
        labels = [pair.id for pair in shown]
        sections.append(Section(f"{name}: {len(pairs)} pairs", labels, rows))
    grid = picture_grid(sections, title="Pairs as imported", reveal=reveal, revealed_by="--reveal")
    data = io.BytesIO()
    grid.save(data, "png")
    storage.write_file(out / "pairs.png", data.getvalue())


def _small(picture: InputPicture) -> UInt8[np.ndarray, "h w 3"]:
    image = Image.open(io.BytesIO(as_kept(picture.read())))
    return np.asarray(image.resize((_CELL, _CELL), Image.Resampling.LANCZOS))
