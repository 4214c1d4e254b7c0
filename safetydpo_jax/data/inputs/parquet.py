"""Rows of parquet files: texts at once, pictures one row group at a time."""

import bisect
import collections
import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from safetydpo_jax.data.inputs.pair import BadPictureError, check_size
from safetydpo_jax.data.inputs.picture import MAX_BYTES
from safetydpo_jax.errors import MissingFileError, UserError

_GROUPS_HELD = 4  # a pair's two pictures may lie far apart
_MAX_GROUP_BYTES = 2**31
_KINDS = {
    "files": (pyarrow.types.is_binary, pyarrow.types.is_large_binary),
    "texts": (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_null),
    "numbers": (
        pyarrow.types.is_integer,
        pyarrow.types.is_floating,
        pyarrow.types.is_boolean,
        pyarrow.types.is_null,
    ),
}


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
        self._paths = list(files)
        self._binary: list[str] = []
        self._groups: list[tuple[Path, int]] = []
        sizes, schemas = [], []
        for path in files:  # each closed again: a data set may have more than a process may open
            with _explained(path), pyarrow.parquet.ParquetFile(path) as file:
                binary = [x.path for x in file.schema if x.physical_type == "BYTE_ARRAY"]
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                schemas.append(file.schema_arrow)
            self._binary = self._binary or binary
            if not schemas[-1].equals(schemas[0]):
                raise UserError(f"{path}: its columns are not those of {files[0]}")
            if any(group.total_byte_size > _MAX_GROUP_BYTES for group in groups):
                raise UserError(f"{path}: has row groups of more than {_MAX_GROUP_BYTES >> 30} GiB")
            self._groups += [(path, i) for i in range(len(groups))]
            sizes += [group.num_rows for group in groups]
        self._ends = list(itertools.accumulate(sizes))
        self.columns = {field.name: field.type for field in schemas[0]}
        self._held: collections.OrderedDict[tuple[int, str], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def binary(self, column: str) -> str:
        """Where the files of a column of pictures are: in it, or in its field `bytes`.

        Raises:
          UserError: it holds no files.
        """
        kind, name = self.columns[column], column
        if pyarrow.types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0:
            kind, name = kind.field(index).type, f"{column}.bytes"
        if not _is(kind, "files"):
            raise UserError(f"{self._paths[0]}: the column {column} holds no files")
        return name

    def texts(self, column: str) -> list[str]:
        """All rows' texts of a column, or of a field of one ("image.path"); "" of a row without.

        Raises:
          UserError: it holds no texts, or a damaged file.
        """
        return [x or "" for x in self._values(column, "texts")]

    def numbers(self, column: str) -> list[float | None]:
        """All rows' numbers of a column, None of a row without; true is 1.

        Raises:
          UserError: it holds no numbers, or a damaged file.
        """
        return [None if x is None else float(x) for x in self._values(column, "numbers")]

    def _values(self, column: str, what: str) -> list[Any]:
        found: list[Any] = []
        for path in self._paths:
            with _explained(path), pyarrow.parquet.ParquetFile(path) as file:
                values = _flat(file.read([column]))
                if values is None or not _is(values.type, what):
                    raise UserError(f"{path}: the column {column} holds no {what}")
                found += values.to_pylist()
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
        check_size(len(value), MAX_BYTES)
        return value

    def _group(self, number: int, column: str) -> Any:
        with self._lock:
            key = (number, column)
            if key not in self._held:
                path, group = self._groups[number]
                try:
                    # Of a value that many rows share, as a dictionary makes it cheap, one copy.
                    with pyarrow.parquet.ParquetFile(path, read_dictionary=self._binary) as file:
                        self._held[key] = _flat(file.read_row_group(group, [column]))
                except (pyarrow.ArrowException, OSError) as error:
                    raise BadPictureError("file that cannot be read") from error
                if len(self._held) > _GROUPS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Of what stops a file from being read, a sentence that says which of the two it is."""
    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not of what the file holds
            raise UserError(f"{path} cannot be read: {os.strerror(error.errno)}") from error
        raise UserError(f"{path}: no parquet file, or a damaged one: download it again") from error


def _flat(table: pyarrow.Table) -> Any:
    """The one column asked for, out of its structure if it is a field of one; None without it."""
    while table.num_columns and pyarrow.types.is_struct(table.schema.field(0).type):
        table = table.flatten()
    return table.column(0) if table.num_columns else None


def _is(kind: pyarrow.DataType, what: str) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_one(kind) for is_one in _KINDS[what])
