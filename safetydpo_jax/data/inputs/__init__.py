"""Pair sets of others: what they look like on disk, read without trusting a byte of it.

Every reader makes an `InputSet` of `InputPair`s from tables alone; `check.usable` then decodes the
pictures. A pair that cannot be used is skipped, with an id and a reason; a table that cannot be
read is a `UserError`. No prompt and no picture's name is ever shown: both may be hateful.
"""

from pathlib import Path

from safetydpo_jax.data.inputs.coprov2 import (
    HUB_COLUMNS,
    has_training_table,
    parquet_files,
    read_coprov2,
)
from safetydpo_jax.data.inputs.folder import TABLE, read_folder
from safetydpo_jax.data.inputs.pair import InputPair, InputSet
from safetydpo_jax.data.inputs.parquet import ParquetRows
from safetydpo_jax.data.inputs.pickapic import read_pickapic
from safetydpo_jax.data.inputs.webdataset import read_webdataset
from safetydpo_jax.errors import MissingFileError, UserError

__all__ = ["FORMATS", "InputPair", "InputSet", "read_input"]

FORMATS = {
    "coprov2": read_coprov2,
    "folder": read_folder,
    "pickapic": lambda folder: read_pickapic(parquet_files(folder)),
    "webdataset": lambda folder: read_webdataset(_shards(folder)),
}


def read_input(folder: Path, kind: str = "") -> tuple[str, InputSet]:
    """The pairs in a folder, and which of `FORMATS` it is.

    Args:
      folder: that others made.
      kind: its format; by default what it looks like.

    Raises:
      MissingFileError: there is no such folder, or what the format needs is not in it.
      UserError: it looks like none of the formats, or a table in it cannot be read.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: there is no such folder")
    if kind and kind not in FORMATS:
        raise UserError(f"there is no format {kind!r}: there are {', '.join(FORMATS)}")
    kind = kind or _looks_like(folder)
    if not kind:
        raise UserError(
            f"{folder} does not look like any of {', '.join(FORMATS)}: docs/pairs.md describes "
            "them; name one with --format to be told what it lacks"
        )
    return kind, FORMATS[kind](folder)


def _looks_like(folder: Path) -> str:
    if (folder / TABLE).is_file():
        return "folder"
    if parquet := parquet_files(folder):
        is_hubs = set(HUB_COLUMNS) <= ParquetRows(parquet[:1]).columns.keys()
        return "coprov2" if is_hubs else "pickapic"
    if has_training_table(folder):
        return "coprov2"
    return "webdataset" if _shards(folder) else ""


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))
