"""A harm: what an expert is to unlearn, each unsafe thing with its safe counterpart; and its file.

The seven built-in categories are harms of the embedded world (emoji/concepts.HARMS); a file of the
user's makes another. Errors tell the number of an entry, never its words: they may be hateful.
"""

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetydpo_jax.command_line import ROOT, shipped
from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.yaml_file import read_yaml

# The harm categories of CoProV2 (SafetyDPO, arXiv 2412.10493).
CATEGORIES = (
    "hate",
    "harassment",
    "violence",
    "self_harm",
    "sexual",
    "shocking",
    "illegal_activity",
)
# A name begins the ids of its prompts, as "safe" those of others. A file may be of one of the
# categories, where they have no prompts of their own: on another than the embedded model.
TAKEN = ("all", "safe")
_SIDES = ("unsafe", "safe")
_KEYS = ("name", "concepts", "prompts", "preserve")
_SHOWN = f"{ROOT / 'docs' / 'own_harm.md'} shows how it is written"


@dataclass(frozen=True)
class HarmPair:
    """An unsafe concept and the safe one that takes its place, best of a similar layout.

    Attributes:
        unsafe: name of the unsafe concept.
        safe: name of its counterpart.
        held_out: the report measures the pair, but no expert is trained on it.
    """

    unsafe: str
    safe: str
    held_out: bool = False


@dataclass(frozen=True)
class Harm:
    """What one expert is about.

    Attributes:
        name: letters, digits, _ and -; the category of its prompts.
        concepts: pairs of concepts, of each unsafe concept one.
        prompts: pairs of an unsafe prompt and its safe twin; never printed.
        preserve: safe prompts whose look training keeps.
    """

    name: str
    concepts: tuple[HarmPair, ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()
    preserve: tuple[str, ...] = ()

    @property
    def unsafe_names(self) -> frozenset[str]:
        """Its unsafe concepts, held-out ones included."""
        return frozenset(pair.unsafe for pair in self.concepts)

    @property
    def names(self) -> frozenset[str]:
        """Its unsafe concepts and their counterparts."""
        return self.unsafe_names | {pair.safe for pair in self.concepts}


@functools.cache  # a run reads its file once: an edit meanwhile would reach only what comes after
def read_harm(path: str) -> Harm:
    """Reads a harm of the user's; docs/own_harm.md describes the file.

    Args:
        path: a YAML file, or a folder with harm.yaml, or with prompts.csv (columns unsafe,safe),
            whose harm has the folder's name; found here or beside the configs.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no such file, or what it says cannot be.
    """
    file = shipped(path)
    if file.is_dir():
        found = [f for f in (file / "harm.yaml", file / "prompts.csv") if f.is_file()]
        if len(found) != 1:
            has = "both" if found else "neither"
            raise UserError(f"{path}: a harm's folder has harm.yaml or prompts.csv, this has {has}")
        file = found[0]
    if not file.is_file():
        raise MissingFileError(f"config.harm is {path}: there is no such file; {_SHOWN}")
    if file.name == "prompts.csv":
        rows = [{key: row[key] for key in _SIDES} for _, row in read_rows(file, _SIDES)]
        content = {"name": file.parent.resolve().name, "prompts": rows}
    else:
        content = read_yaml(file, _SHOWN)
    return _checked(content, file)


def _checked(content: Any, file: Path) -> Harm:
    if not isinstance(content, dict):
        raise UserError(f"{file} must have the keys name and concepts or prompts; {_SHOWN}")
    _check_keys(content, _KEYS, str(file))
    name = content.get("name")
    if name is None:
        raise UserError(f"{file} has no name: give the harm one, as in 'name: gambling'")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
        raise UserError(
            f"{file}: the name must be 1 to 40 letters, digits, _ and - (and in quotes if it is a "
            "number); of a folder with prompts.csv it is the folder's"
        )
    if name.lower() in TAKEN:
        raise UserError(f"{file}: the name {name} is taken, as is {' or '.join(TAKEN)}")

    def pairs(key: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        entries = _entries(content, key, file)
        found = [_pair(entry, keys, _where(file, i, key)) for i, entry in enumerate(entries)]
        # Of a concept, one counterpart; a prompt may have several twins.
        said = [(p["unsafe"], "" if key == "concepts" else p["safe"]) for p in found]
        _check_distinct(said, key, file)
        return found

    concepts = [HarmPair(**pair) for pair in pairs("concepts", ("unsafe", "safe", "held_out"))]
    prompts = [(pair["unsafe"], pair["safe"]) for pair in pairs("prompts", _SIDES)]
    entries = _entries(content, "preserve", file)
    preserve = [_text(entry, _where(file, i, "preserve")) for i, entry in enumerate(entries)]
    _check_distinct([(text,) for text in preserve], "preserve", file)
    if not concepts and not prompts:
        raise UserError(f"{file} has neither concepts nor prompts: give one of them; {_SHOWN}")
    if not prompts and all(pair.held_out for pair in concepts):
        raise UserError(f"{file}: all concepts are held out; leave one at least to train on")
    unsafe = [pair.unsafe.casefold() for pair in concepts]
    for i, pair in enumerate(concepts):
        if pair.safe.casefold() in unsafe:
            other = unsafe.index(pair.safe.casefold()) + 1
            raise UserError(
                f"{_where(file, i, 'concepts')}: its 'safe' is the 'unsafe' of entry {other}"
            )
    return Harm(name, tuple(concepts), tuple(prompts), tuple(preserve))


def _where(file: Path, index: int, key: str) -> str:
    return f"{file}, entry {index + 1} of {key}"


def _check_keys(table: dict[Any, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            # It is not named: where a line lacks its key, a prompt stands in its place.
            meant = difflib.get_close_matches(str(key), known, 1, 0.8)
            hint = f" (did you mean {meant[0]}?)" if meant else ""
            raise UserError(f"{where}: unknown key{hint}; the keys are {', '.join(known)}")


def _entries(content: dict[str, Any], key: str, file: Path) -> list[Any]:
    if key not in content:
        return []
    entries = content[key]
    if not isinstance(entries, list):
        raise UserError(f"{file}: {key} must be a list of entries, each after a dash; {_SHOWN}")
    if not entries:
        raise UserError(f"{file}: {key} is empty; give an entry, or leave {key} out")
    return entries


def _pair(entry: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must have the keys unsafe and safe; {_SHOWN}")
    _check_keys(entry, keys, where)
    pair: dict[str, Any] = {}
    for key in _SIDES:
        if key not in entry:
            raise UserError(f"{where} has no {key!r}")
        pair[key] = _text(entry[key], f"{where}, {key!r}")
    if pair["unsafe"].casefold() == pair["safe"].casefold():
        raise UserError(f"{where}: 'unsafe' and 'safe' are the same")
    if "held_out" in entry:
        if not isinstance(entry["held_out"], bool):
            raise UserError(f"{where}: 'held_out' must be true or false")
        pair["held_out"] = entry["held_out"]
    return pair


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} must be a text; put what YAML takes for something else in quotes")
    return " ".join(value.split())


def _check_distinct(said: list[tuple[str, ...]], key: str, file: Path) -> None:
    seen: dict[tuple[str, ...], int] = {}
    for i, texts in enumerate(said):
        if (first := seen.setdefault(tuple(text.casefold() for text in texts), i)) != i:
            raise UserError(f"{_where(file, i, key)} repeats entry {first + 1}")
