"""Pictures and files to make inputs of, and what becomes of an input."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from safetydpo_jax.data.inputs import read_input
from safetydpo_jax.data.inputs.check import usable

HEADER = "prompt_unsafe,prompt_safe,image_unsafe,image_safe,category\n"
ROW = "bad word,good word,u.png,s.png,hate\n"


def encoded(kind="png", mode="RGB", size=(64, 64), **options):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize(size).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(folder, kind=""):
    """(ids of the usable pairs, reasons of the skipped ones, what was said)."""
    said = []
    found = usable(read_input(folder, kind)[1], said.append)
    return [pair.id for pair in found.pairs], sorted(found.skipped.values()), said


def write_parquet(path, rows, **options):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1, **options)
