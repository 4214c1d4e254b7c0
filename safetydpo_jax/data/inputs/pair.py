"""Pairs as others keep them: prompts in memory, pictures still in their files."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from safetydpo_jax.errors import UserError

ALL, VALIDATION = TAKEN = ("all", "validation")  # folders of an import that are no category's
_CATEGORY = re.compile(r"[A-Za-z0-9_-]{1,40}")  # it becomes a folder


class BadPictureError(Exception):
    """A picture that cannot be used; its text is a reason in a few words, which reports count."""


@dataclass(frozen=True)
class InputPicture:
    """One side of a pair.

    Attributes:
      prompt: what it was drawn for; never printed.
      read: its file's bytes, or a `BadPictureError`; called from several threads.
    """

    prompt: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class InputPair:
    """An unsafe picture and the safe one that is preferred to it.

    Attributes:
      id: names the pair without showing it.
      unsafe: loses.
      safe: wins.
      categories: of harm, none if the input does not say.
    """

    id: str
    unsafe: InputPicture
    safe: InputPicture
    categories: tuple[str, ...]


@dataclass(frozen=True)
class TestPrompt:
    """An unsafe prompt to evaluate with.

    Attributes:
      id: names it without showing it.
      text: the prompt; never printed.
      category: of harm.
      in_train: whether a training pair has the same unsafe prompt, up to case and outer spaces.
    """

    __test__ = False  # pytest would take it for a test

    id: str
    text: str
    category: str
    in_train: bool


@dataclass
class InputSet:
    """What a reader found.

    Attributes:
      pairs: complete as far as the tables tell; no picture has been opened.
      skipped: by id, why something is no pair.
      test: prompts for evaluation, if the input has any.
      digests: SHA-256 of the pictures' files by the pair's id, once they have been read.
    """

    pairs: list[InputPair] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    test: list[TestPrompt] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def add(
        self, name: str, unsafe: InputPicture, safe: InputPicture, categories: tuple[str, ...]
    ) -> None:
        """Takes a pair, or notes why it is none."""
        prompts = (unsafe.prompt, safe.prompt)
        if not all(prompt.strip() for prompt in prompts):
            self.skipped[name] = "empty prompt"
        elif any("\0" in prompt for prompt in prompts):
            self.skipped[name] = "NUL in a prompt"
        elif any("\ud800" <= letter <= "\udfff" for prompt in prompts for letter in prompt):
            self.skipped[name] = "prompt that is no text"
        else:
            self.pairs.append(InputPair(name, unsafe, safe, categories))


def folded(prompt: str) -> str:
    """As prompts are compared: those of CoProV2's tests differ from its training's by less."""
    return prompt.strip().lower()


def check_size(size: int, limit: int) -> None:
    """Raises a `BadPictureError` if a file has more bytes than the limit, in whole MiB."""
    if size > limit:
        raise BadPictureError(f"file of more than {limit >> 20} MiB")


def category_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """A pair's categories without repeats and empty names.

    Args:
      names: as the input has them.
      where: they stand there, for errors.

    Raises:
      UserError: one could not be the folder of a pair set.
    """
    found = tuple(dict.fromkeys(name for x in names if (name := x.strip())))
    if not all(_CATEGORY.fullmatch(name) and name.lower() not in TAKEN for name in found):
        raise UserError(
            f"{where}: a category must be 1 to 40 letters, digits, _ and -, and not "
            f"{' or '.join(TAKEN)}"
        )
    return found
