"""Rows of parquet files: texts at once, pictures one row group at a time."""

import bisect
import collections
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from safetydpo_jax.data.inputs.pair import BadPictureError
from safetydpo_jax.errors import MissingFileError, UserError

_GROUPS_HELD = 4  # a pair's two pictures may lie far apart


class ParquetRows:
    """The rows of some files one after the other, as the model hub splits a data set.

    Args:
      files: of the same columns.

    Attributes:
      columns: by name, their Arrow types.

    Raises:
      MissingFileError: no files.
      UserError: one of them is no parquet file, or its columns are others.
    """

    def __init__(self, files: Sequence[Path]):
        if not files:
            raise MissingFileError("there are no parquet files")
        self._files: list[pyarrow.parquet.ParquetFile] = []
        self._groups: list[tuple[pyarrow.parquet.ParquetFile, int]] = []
        for path in files:
            try:
                file = pyarrow.parquet.ParquetFile(path)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(
                    f"{path}: no parquet file, or a damaged one: download it again"
                ) from error
            if self._files and not file.schema_arrow.equals(self._files[0].schema_arrow):
                raise UserError(f"{path}: its columns are not those of {files[0]}")
            self._groups += [(file, i) for i in range(file.num_row_groups)]
            self._files.append(file)
        self._paths = list(files)
        sizes = [file.metadata.row_group(i).num_rows for file, i in self._groups]
        self._ends = list(itertools.accumulate(sizes))
        self.columns = {field.name: field.type for field in self._files[0].schema_arrow}
        self._held: collections.OrderedDict[tuple[int, str], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def is_binary(self, column: str) -> bool:
        """Whether a column holds bytes, not a structure or a text."""
        kind = self.columns[column]
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    def values(self, column: str) -> list[Any]:
        """All rows' values of a column that is small; "image.path" is a field of a column.

        Raises:
          UserError: a damaged file.
        """
        found: list[Any] = []
        for path, file in zip(self._paths, self._files, strict=True):
            try:
                found += _flat(file.read([column])).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path}: damaged: download it again") from error
        return found

    def picture(self, row: int, column: str) -> bytes:
        """A row's bytes of a column of binary values, or of "image.bytes".

        Raises:
          BadPictureError: there are none, or they cannot be read.
        """
        number = bisect.bisect_right(self._ends, row)
        first = self._ends[number - 1] if number else 0
        value = self._group(number, column)[row - first].as_py()
        if value is None:
            raise BadPictureError("no such picture")
        return value

    def _group(self, number: int, column: str) -> Any:
        with self._lock:
            key = (number, column)
            if key not in self._held:
                file, group = self._groups[number]
                try:
                    self._held[key] = _flat(file.read_row_group(group, [column]))
                except (pyarrow.ArrowException, OSError) as error:
                    raise BadPictureError("file that cannot be read") from error
                if len(self._held) > _GROUPS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]


def _flat(table: pyarrow.Table) -> Any:
    """The one column asked for, out of its structure if it is a field of one."""
    while pyarrow.types.is_struct(table.schema.field(0).type):
        table = table.flatten()
    return table.column(0)
