"""A folder with pairs.csv: columns prompt_unsafe,prompt_safe,image_unsafe,image_safe,category.

Pictures are named relative to the folder. A pair of several categories has them separated by ";",
and one without a category has none; nor has any where the column is missing.
"""

import functools
from pathlib import Path

from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.data.inputs.files import open_pictures
from safetydpo_jax.data.inputs.pair import InputPicture, InputSet, category_names

TABLE = "pairs.csv"
COLUMNS = ("prompt_unsafe", "prompt_safe", "image_unsafe", "image_safe")


def read_folder(folder: Path) -> InputSet:
    """The pairs in the order of the table; their ids are its lines.

    Raises:
      MissingFileError: no table.
      UserError: it cannot be read, or a category is no name.
    """
    read = open_pictures(folder)
    found = InputSet()
    for i, (where, row) in enumerate(read_rows(folder / TABLE, COLUMNS, ("category",))):
        unsafe, safe = (
            InputPicture(row[f"prompt_{side}"], functools.partial(read, row[f"image_{side}"]))
            for side in ("unsafe", "safe")
        )
        categories = category_names(row.get("category", "").split(";"), where)
        found.add(f"pair-{i:06d}", unsafe, safe, categories)
    return found
