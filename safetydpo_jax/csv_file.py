"""CSV files of prompts. Errors name file, line and column, never a value: a prompt may be harm."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.storage import write_file


def read_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table, each with where it stands, for errors.

    Args:
      path: UTF-8, with or without a byte order mark; the first line names the columns.
      columns: that it must have; it may have others.
      optional: said in the error if one of `columns` is missing.

    Raises:
      MissingFileError: there is no such file.
      UserError: it is no such table: not UTF-8, no valid CSV, a column missing or named twice, a
        row of another length, or no row at all. As rows are read when they are asked for, so are
        errors raised.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the file is not UTF-8 text") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    count = 0
    try:
        names = list(reader.fieldnames or ())
        if missing := [name for name in columns if name not in names]:
            also = f" and may name {', '.join(optional)}" if optional else ""
            raise UserError(
                f"{path}: the first line lacks the column {' and '.join(missing)}; it must name "
                f"the columns {','.join(columns)}{also}"
            )
        if twice := sorted({n for n in (*columns, *optional) if names.count(n) > 1}):
            raise UserError(f"{path}: the first line names the column {twice[0]} twice")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: not as many fields as the first line has; put a prompt that holds a "
                    "comma in double quotes"
                )
            count += 1
            yield where, row
    except csv.Error as error:
        # The line of the reader below: DictReader's is the one before.
        line = reader.reader.line_num
        raise UserError(f"{path}, line {line}: not valid CSV ({error})") from None
    if not count:
        raise UserError(f"{path}: the table has no rows below its first line")


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes a table that `read_rows` reads; the file appears whole or not at all."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(columns)
    table.writerows(rows)
    write_file(path, text.getvalue().encode())
