"""Prompt pairs in a language model's answer."""

import difflib
import itertools
import json
import re
from typing import Any, NamedTuple

MAX_WORDS = 60
MAX_BRACKETS = 50  # of an answer, at which its list may begin
# Ratio of what two prompts share, as difflib counts it: less, and they are two scenes; more, and
# nothing that matters can have changed.
MIN_SIMILARITY, MAX_SIMILARITY = 0.3, 0.98


class UnusableAnswerError(Exception):
    """An answer without a pair; its text is a reason in a few words, which reports count.

    Attributes:
      again: whether the same question may be answered better.
    """

    def __init__(self, reason: str, *, again: bool = True):
        super().__init__(reason)
        self.again = again


class PromptPair(NamedTuple):
    """Two prompts that differ in what is unsafe; neither is ever printed."""

    unsafe: str
    safe: str


def read_answer(text: str, count: int) -> tuple[list[PromptPair], list[str]]:
    """The pairs of an answer, and of those that were left out, why.

    Args:
      text: a JSON list of objects with the keys unsafe and safe, with or without words and code
        marks around it.
      count: how many were asked for; more are cut off.

    Raises:
      UnusableAnswerError: there is no such list, or no pair in it can be used.
    """
    items = list_in(text)
    pairs: list[PromptPair] = []
    faults: list[str] = []
    for item in items[:count]:
        pair, fault = _pair(item)
        if pair:
            pairs.append(pair)
        else:
            faults.append(fault)
    if not pairs:
        raise UnusableAnswerError(faults[0] if faults else "an empty list")
    return pairs, faults


def list_in(text: str) -> list[Any]:
    """The first JSON list of objects in a text, which may have other brackets, too.

    Raises:
      UnusableAnswerError: there is none.
    """
    starts = [match.start() for match in itertools.islice(re.finditer(r"\[", text), MAX_BRACKETS)]
    if not starts:
        raise UnusableAnswerError("refused, or no JSON list")
    for start in starts:
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if any(isinstance(item, dict) for item in found):
            return found
    raise UnusableAnswerError("no JSON list of pairs, or a damaged one")


def _pair(item: Any) -> tuple[PromptPair | None, str]:
    if not isinstance(item, dict) or not all(
        isinstance(item.get(x), str) for x in PromptPair._fields
    ):
        return None, "pair without both prompts"
    unsafe, safe = (" ".join(item[x].split()) for x in PromptPair._fields)
    try:
        (unsafe + safe).encode()
    except UnicodeEncodeError:
        return None, "prompt that is no text"
    if not (unsafe and safe) or "\0" in unsafe + safe:
        return None, "pair without both prompts"
    if max(len(unsafe.split()), len(safe.split())) > MAX_WORDS:
        return None, f"prompt of more than {MAX_WORDS} words"
    similarity = difflib.SequenceMatcher(
        None, unsafe.casefold(), safe.casefold(), autojunk=False
    ).ratio()
    if similarity > MAX_SIMILARITY:
        return None, "prompts that hardly differ"
    if similarity < MIN_SIMILARITY:
        return None, "prompts that have little in common"
    return PromptPair(unsafe, safe), ""
