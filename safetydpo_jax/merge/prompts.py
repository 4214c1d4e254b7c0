"""The prompts that statistics are made on: a table's, or the embedded world's."""

from pathlib import Path

from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.moments import SAFE

COLUMNS = ("category", "prompt")


def read_prompts(
    path: Path, most: int | None = None, *, safe: bool = True
) -> tuple[list[str], list[str]]:
    """The prompts of a CSV and the category of each.

    Args:
      path: a table with the columns category and prompt; others are ignored.
      most: of each category, the first; None for all.
      safe: those of category "safe", too.

    Raises:
      UserError, MissingFileError: it is no such table, or a field is empty.
    """
    prompts, categories = [], []
    for where, row in read_rows(path, COLUMNS):
        for column in COLUMNS:
            if not row[column].strip():
                raise UserError(f"{where}: the column {column} is empty")
        category = row["category"].strip()
        if category == SAFE and not safe:
            continue
        if most is None or categories.count(category) < most:
            prompts.append(row["prompt"].strip())
            categories.append(category)
    return prompts, categories


def emoji_prompts(count: int, seed: int, *, safe: bool = False) -> tuple[list[str], list[str]]:
    """Prompts of the embedded world, as experts are trained on, and their categories.

    Args:
      count: unsafe prompts of each of the seven categories.
      seed: of the draw.
      safe: as many safe prompts as there are unsafe ones, too, of category "safe".
    """
    from safetydpo_jax.emoji.concepts import ALL, HARMS  # here: other bases need none of it
    from safetydpo_jax.emoji.prompts import harm_prompts, preserve_prompts

    prompts, categories = [], []
    for name, harm in HARMS.items():
        for unsafe, _ in harm_prompts(harm, count, seed):
            prompts.append(unsafe.text)
            categories.append(name)
    for record in preserve_prompts(ALL, len(prompts), seed) if safe else ():
        prompts.append(record.text)
        categories.append(SAFE)
    return prompts, categories
