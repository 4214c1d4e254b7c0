"""A merge's options in a YAML file, by the names that the command line has for them."""

import argparse
import contextlib
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.yaml_file import read_yaml

_NOT_HERE = ("recipe", "help")
_EXPERT = ("file", "weight")
_SHOWN = "a recipe is a table of options, as in 'method: ties'"


def read_recipe(path: Path, options: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """The values of a recipe, converted as on the command line.

    `experts` is a list of files, or of tables with `file` and `weight`. Paths that are not absolute
    are taken from the recipe's own folder, so that it can be moved with its experts.

    Args:
      path: the file.
      options: the command line's, by name.

    Raises:
      MissingFileError: there is no such file.
      UserError: it is no YAML table, or a key or value is none that there can be, or twice.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such recipe")
    content = read_yaml(path, _SHOWN)
    if not isinstance(content, dict):
        raise UserError(f"{path}: {_SHOWN}")
    known = {name: action for name, action in options.items() if name not in _NOT_HERE}
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            meant = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"there are {', '.join(known)}"
            raise UserError(f"{path}: there is no option {key!r}; {hint}")
        if key == "experts":
            files, weights = _experts(value, path)
            values["experts"] = files
            if weights and "weights" in content:
                raise UserError(f"{path}: weights are given twice: here and beside the experts")
            if weights:
                values["weights"] = weights
        else:
            values[key] = _converted(value, known[key], f"{path}, {key}")
    for key in ("stats", "prompts", "out"):
        if key in values:
            values[key] = path.parent / values[key]
    for key in ("model", "model_config"):  # or a name
        if values.get(key) and (path.parent / values[key]).exists():
            values[key] = str(path.parent / values[key])
    return values


def _experts(entries: Any, path: Path) -> tuple[list[str], list[float]]:
    if not isinstance(entries, list):
        raise UserError(f"{path}: experts must be a list of files, each after a dash")
    files, weights = [], []
    for i, entry in enumerate(entries, 1):
        where = f"{path}, expert {i}"
        table = {"file": entry} if isinstance(entry, str) else entry
        if not isinstance(table, dict) or not isinstance(table.get("file"), str):
            raise UserError(f"{where}: give a file, or a table with file and weight")
        if wrong := [key for key in table if key not in _EXPERT]:
            raise UserError(f"{where}: there is no key {wrong[0]!r}; the keys are file and weight")
        weight = _number(table.get("weight", 1.0))
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise UserError(f"{where}: the weight must be a number")
        files.append(str(path.parent / table["file"]))
        weights.append(float(weight))
    return files, [] if all(weight == 1 for weight in weights) else weights


def _number(value: Any) -> Any:
    """What PyYAML takes for a text though it is a number, as 1e-3 without a point."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _converted(value: Any, option: argparse.Action, where: str) -> Any:
    convert: Any = option.type or str
    wanted = {int: "a whole number", float: "a number"}.get(convert, "a text")
    fits = {int: int, float: (int, float)}.get(convert, str)

    def one(x: Any) -> Any:
        x = _number(x) if convert is float else x
        if isinstance(x, bool) or not isinstance(x, fits):
            raise UserError(f"{where}: it must be {wanted}, not {x!r}")
        if option.choices is not None and x not in option.choices:
            raise UserError(f"{where}: {x!r} is none of {', '.join(option.choices)}")
        try:
            return convert(x)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: {error}") from None

    if option.nargs == "+":
        if not isinstance(value, list):
            raise UserError(f"{where}: it must be a list")
        return [one(x) for x in value]
    return one(value)
