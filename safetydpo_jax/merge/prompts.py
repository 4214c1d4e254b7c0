"""The prompts that votes are counted on: a table's, or the embedded world's."""

from pathlib import Path

from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.errors import UserError

COLUMNS = ("category", "prompt")


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """The prompts of a CSV and the category of each.

    Args:
      path: a table with the columns category and prompt; others are ignored.

    Raises:
      UserError, MissingFileError: it is no such table, or a field is empty.
    """
    prompts, categories = [], []
    for where, row in read_rows(path, COLUMNS):
        for column in COLUMNS:
            if not row[column].strip():
                raise UserError(f"{where}: the column {column} is empty")
        prompts.append(row["prompt"].strip())
        categories.append(row["category"].strip())
    return prompts, categories


def emoji_prompts(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Unsafe prompts for tuning of the embedded world's seven categories, and their categories.

    Args:
      count: prompts of each category.
      seed: of the draw.
    """
    from safetydpo_jax.emoji.concepts import HARMS  # here: other bases need none of it
    from safetydpo_jax.emoji.prompts import harm_prompts

    prompts, categories = [], []
    for name, harm in HARMS.items():
        for unsafe, _ in harm_prompts(harm, count, seed, split="tune"):
            prompts.append(unsafe.text)
            categories.append(name)
    return prompts, categories
