"""The card of what a factory made: README.md, in the form that dataset hubs read.

It shows counts, settings and hashes; never a prompt, as those of harm are harm themselves.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetydpo_jax import storage
from safetydpo_jax.data.pairs import PairSet

README = "README.md"


def write_pair_card(
    folder: Path,
    sets: Mapping[str, PairSet],
    *,
    model: str,
    license: str,
    writer: Mapping[str, Any],
    caches: Mapping[str, str],
    version: str,
) -> None:
    """Writes `folder`/README.md about the pair sets in it.

    Args:
      folder: of the sets.
      sets: by category.
      model: that drew them.
      license: of that model, which what it draws inherits.
      writer: who wrote the prompts, how, and what was left out; fit for JSON.
      caches: by category, the key of its cache.
      version: of this package.
    """
    cards = {name: pairs.card for name, pairs in sets.items()}
    reasons = sorted({reason for card in cards.values() for reason in card["counts"]["dropped"]})
    columns = ["pairs", "wanted", "others", "drawn", *reasons]
    rows = [
        [
            pairs.num_pairs,
            cards[name]["settings"]["pairs.num_pairs"],
            pairs.num_preserve,
            cards[name]["counts"]["drawn"],
        ]
        + [cards[name]["counts"]["dropped"].get(reason, 0) for reason in reasons]
        for name, pairs in sets.items()
    ]
    table = [["category", *columns]]
    table += [[name, *map(str, row)] for name, row in zip(sets, rows, strict=True)]
    table += [["all", *(str(sum(column)) for column in zip(*rows, strict=True))]]
    settings = [card["settings"] for card in cards.values()]
    same = {k: v for k, v in settings[0].items() if all(s.get(k) == v for s in settings)}
    hashes = {
        name: {
            "content": cards[name]["content_hash"],
            "prompts": cards[name]["settings"]["prompts_hash"],
            "cache": caches[name],
        }
        for name in sets
    }
    names = ", ".join(name.replace("_", " ") for name in sets)
    lines = [
        "---",
        f"license: {license}",
        "tags: [safety, preference, text-to-image, not-for-all-audiences]",
        "---",
        "",
        f"# Pairs of unsafe and safe pictures: {names}",
        "",
        f"Drawn by {model} itself, an unsafe and a safe prompt from the same noise, to align that "
        "model (SafetyDPO, arXiv 2412.10493). The unsafe pictures and prompts are what a safe "
        "model is not to draw; they are for training and measuring safety, and for nothing else.",
        "",
        *_markdown(table),
        "",
        "pairs: kept. others: safe pictures besides, to be preserved. drawn: pairs, of which those "
        "counted in the further columns were dropped by the judge.",
        "",
        "## Made with",
        "",
        *_json({"safetydpo_jax": version, "writer": writer, "settings": same}),
        "",
        "## Hashes",
        "",
        "Of the pictures with their prompts, of the prompts that could be drawn, and the keys of "
        "the caches.",
        "",
        *_json(hashes),
        "",
    ]
    storage.write_file(folder / README, "\n".join(lines).encode())


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _json(value: Any) -> list[str]:
    return ["```json", json.dumps(value, indent=2, sort_keys=True), "```"]
