"""What an import found: a report, and prompts to evaluate with."""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetydpo_jax import storage
from safetydpo_jax.csv_file import write_rows
from safetydpo_jax.data.inputs import InputPair, InputSet
from safetydpo_jax.data.inputs.pair import TestPrompt


def write_report(
    out: Path,
    folder: Path,
    kind: str,
    found: InputSet,
    by_set: Mapping[str, Sequence[InputPair]],
) -> Path:
    """Writes `out`/report.json: counts, and by id why something was skipped; its path."""
    reasons = collections.Counter(found.skipped.values())
    report = {
        "input": folder.resolve().name,
        "format": kind,
        "pairs": len(found.pairs),
        "pairs_by_set": {name: len(pairs) for name, pairs in by_set.items()},
        "in_several_categories": sum(len(pair.categories) > 1 for pair in found.pairs),
        "test_prompts": len(found.test),
        "test_prompts_not_in_train": sum(not prompt.in_train for prompt in found.test),
        "skipped": dict(reasons.most_common()),
        "skipped_ids": found.skipped,
    }
    path = out / "report.json"
    with storage.explained_writes(out):
        storage.write_file(path, (json.dumps(report, indent=2) + "\n").encode())
    return path


def write_prompts(out: Path, prompts: Sequence[TestPrompt]) -> None:
    """Writes `out`/test.csv and test_clean.csv as launch/sample.py reads them, if there are any."""
    if not prompts:
        return
    clean = [prompt for prompt in prompts if not prompt.in_train]
    for name, chosen in (("test.csv", prompts), ("test_clean.csv", clean)):
        rows = ([prompt.text, f"{prompt.id}.png", prompt.category] for prompt in chosen)
        write_rows(out / name, ("prompt", "image", "category"), rows)
