"""Preferences in the columns of Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569), in parquet.

`jpg_0` and `jpg_1` hold the files of two pictures drawn for `caption`; `label_0` is 1 if the first
is preferred, 0 if the second is, 0.5 if neither. The preferred one is the safe one. Ties and rows
whose `has_label` is false are skipped. A column `category` is optional.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from safetydpo_jax.data.inputs.pair import InputPicture, InputSet, category_names
from safetydpo_jax.data.inputs.parquet import ParquetRows
from safetydpo_jax.errors import UserError

COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")


def read_pickapic(files: Sequence[Path]) -> InputSet:
    """The pairs in the order of the rows.

    Raises:
      MissingFileError: no files.
      UserError: one cannot be read, a column is missing, or a category is no name.
    """
    rows = ParquetRows(files)
    if missing := set(COLUMNS) - rows.columns.keys():
        raise UserError(
            f"{files[0]} lacks the column {min(missing)}: it must have {', '.join(COLUMNS)}"
        )
    labels, captions = rows.numbers("label_0"), rows.texts("caption")
    labelled, categories = [1.0] * len(labels), [""] * len(labels)
    if "has_label" in rows.columns:
        labelled = rows.numbers("has_label")
    if "category" in rows.columns:
        categories = rows.texts("category")
    columns = [rows.binary(name) for name in COLUMNS[:2]]
    found = InputSet()
    for i, (label, caption, is_labelled, category) in enumerate(
        zip(labels, captions, labelled, categories, strict=True)
    ):
        name = f"row-{i:06d}"
        if not is_labelled or label not in (0, 1):
            found.skipped[name] = "no preference"
            continue
        first, second = (
            InputPicture(caption, functools.partial(rows.picture, i, column)) for column in columns
        )
        unsafe, safe = (second, first) if label == 1 else (first, second)
        found.add(name, unsafe, safe, category_names([category], f"{files[0]}, row {i}"))
    return found
