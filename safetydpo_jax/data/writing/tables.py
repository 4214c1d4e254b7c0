"""The tables of prompts: without near-duplicates, concepts in turn, categories of like size."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetydpo_jax import storage
from safetydpo_jax.csv_file import write_rows
from safetydpo_jax.data.writing.answers import PromptPair
from safetydpo_jax.data.writing.concepts import Concept
from safetydpo_jax.data.writing.packages import needed

# MinHash (Broder 1997) over runs of so many letters; what is about this similar (Jaccard) is one.
# The index finds candidates from a lower bound on, which are then compared.
SHINGLE, NEAR_DUPLICATE, CANDIDATE, PERMUTATIONS = 5, 0.7, 0.5, 128


def in_turn(pairs: Mapping[str, Sequence[PromptPair]]) -> list[tuple[str, PromptPair]]:
    """(concept's id, pair): the first of each concept, then the second of each, and so on."""
    rows = itertools.zip_longest(*([(name, pair) for pair in x] for name, x in pairs.items()))
    return [entry for row in rows for entry in row if entry is not None]


def distinct(pairs: Iterable[tuple[str, PromptPair]]) -> list[tuple[str, PromptPair]]:
    """Those whose unsafe prompt is no near-duplicate of one before.

    Raises:
      UserError: the library for it is not installed.
    """
    datasketch = needed("datasketch")
    index = datasketch.MinHashLSH(threshold=CANDIDATE, num_perm=PERMUTATIONS)
    kept: list[tuple[str, PromptPair]] = []
    sketches: dict[Any, Any] = {}
    for name, pair in pairs:
        text = pair.unsafe.casefold()
        runs = {text[i : i + SHINGLE].encode() for i in range(max(1, len(text) - SHINGLE + 1))}
        sketch = datasketch.MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch(list(runs))
        near = (sketches[i] for i in index.query(sketch))
        if all(sketch.jaccard(other) < NEAR_DUPLICATE for other in near):
            index.insert(len(kept), sketch)
            sketches[len(kept)] = sketch
            kept.append((name, pair))
    return kept


def write_tables(
    out: Path,
    concepts: Sequence[Concept],
    pairs: Mapping[str, Sequence[PromptPair]],
    per_category: int,
) -> dict[str, dict[str, int]]:
    """Writes `out`/CATEGORY/prompts.csv, as `harm.read_harm` takes it.

    Args:
      out: the folder.
      concepts: of all categories.
      pairs: by the concept's id.
      per_category: pairs of each category at most; 0 for all.

    Returns:
      By category: "written", the pairs that could be used, "kept" of them, "duplicates" and
      "beyond" what was wanted.
    """
    counts = {}
    for category in dict.fromkeys(concept.category for concept in concepts):
        names = [concept.id for concept in concepts if concept.category == category]
        found = in_turn({name: pairs.get(name, ()) for name in names})
        kept = distinct(found)
        chosen = kept[: per_category or None]
        counts[category] = {
            "written": len(found),
            "kept": len(chosen),
            "duplicates": len(found) - len(kept),
            "beyond": len(kept) - len(chosen),
        }
        if not chosen:
            continue
        rows = ([pair.unsafe, pair.safe, name] for name, pair in chosen)
        with storage.explained_writes(out):
            (out / category).mkdir(parents=True, exist_ok=True)
            write_rows(out / category / "prompts.csv", ("unsafe", "safe", "concept"), rows)
    return counts
