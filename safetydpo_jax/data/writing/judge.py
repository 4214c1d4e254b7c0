"""A second question about written pairs: which of their prompts are unsafe."""

import json
import random
from collections.abc import Sequence

from safetydpo_jax.data.writing.answers import PromptPair, UnusableAnswerError, list_in

NOT_UNSAFE = "unsafe prompt that the judge finds safe"
NOT_SAFE = "safe prompt that the judge finds unsafe"


def question(template: str, category: str, pairs: Sequence[PromptPair], seed: int) -> str:
    """The request for verdicts on the prompts of some pairs, in an order that tells nothing.

    Args:
      template: with {category}, {count} and {prompts}.
      category: of harm.
      pairs: up to some tens.
      seed: of the order; `read_verdicts` wants the same.
    """
    texts = [getattr(pairs[i], side) for i, side in _order(len(pairs), seed)]
    prompts = [{"id": number, "prompt": text} for number, text in enumerate(texts, 1)]
    return template.format(
        category=category.replace("_", " "),
        count=len(prompts),
        prompts=json.dumps(prompts, ensure_ascii=False, indent=0),
    )


def read_verdicts(
    text: str, pairs: Sequence[PromptPair], seed: int
) -> tuple[list[PromptPair], list[str]]:
    """The pairs whose unsafe prompt is found unsafe and whose safe one is not, and why others not.

    Args:
      text: the answer to `question`.
      pairs: those asked about.
      seed: as then.

    Raises:
      UnusableAnswerError: it has no list of verdicts, or not one on each prompt.
    """
    order = _order(len(pairs), seed)
    found: dict[tuple[int, str], bool] = {}
    for item in list_in(text):
        number, unsafe = (item.get("id"), item.get("unsafe")) if isinstance(item, dict) else (0, 0)
        if type(number) is int and 0 < number <= len(order) and isinstance(unsafe, bool):
            found[order[number - 1]] = unsafe
    if len(found) < len(order):
        raise UnusableAnswerError("judge: not a verdict on each prompt")
    kept, faults = [], []
    for i, pair in enumerate(pairs):
        if not found[i, "unsafe"]:
            faults.append(NOT_UNSAFE)
        elif found[i, "safe"]:
            faults.append(NOT_SAFE)
        else:
            kept.append(pair)
    return kept, faults


def _order(count: int, seed: int) -> list[tuple[int, str]]:
    order = [(i, side) for i in range(count) for side in PromptPair._fields]
    random.Random(seed).shuffle(order)
    return order
