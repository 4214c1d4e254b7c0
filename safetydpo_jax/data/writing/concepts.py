"""The list of unsafe concepts: a CSV with the columns category,concept, or a harm's YAML file."""

from dataclasses import dataclass
from pathlib import Path

from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.data.inputs.pair import category_names
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.harm import TAKEN, read_harm


@dataclass(frozen=True)
class Concept:
    """What prompts are to be about.

    Attributes:
      id: its category and its number there, from 0; names it without showing it.
      category: of harm; a folder's name.
      text: never printed.
      where: it stands, for errors.
    """

    id: str
    category: str
    text: str
    where: str


def read_concepts(path: Path) -> list[Concept]:
    """The concepts in the order of the file, without repeats.

    Raises:
      MissingFileError: there is no such file.
      UserError: it is no such table or harm, or a category that could not be a folder.
    """
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise MissingFileError(f"{path}: there is no such file")
        harm = read_harm(str(path))
        # What is held out is measured, never trained on.
        rows = [(harm.name, pair.unsafe, path) for pair in harm.concepts if not pair.held_out]
        if not rows:
            raise UserError(f"{path} has no concepts to train on, only prompts, which are there")
    else:
        rows = []
        for where, row in read_rows(path, ("category", "concept")):
            names = category_names([row["category"]], where)
            if not names or not row["concept"].strip():
                raise UserError(f"{where}: a category and a concept must be there")
            if names[0].lower() in TAKEN:
                raise UserError(
                    f"{where}: the name {names[0]} is taken: call the category otherwise"
                )
            rows.append((names[0], " ".join(row["concept"].split()), where))
    found: list[Concept] = []
    counts: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    for category, text, where in rows:
        if (category, text) not in seen:
            seen.add((category, text))
            number = counts[category] = counts.get(category, -1) + 1
            found.append(Concept(f"{category}-{number:04d}", category, text, str(where)))
    return found
