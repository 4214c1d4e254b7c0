"""Merging more and more experts into one LoRA of one rank: what becomes of their effect.

    python benchmarks/merge/scaling.py                     # the finalists, rank 28, seed 0
    python benchmarks/merge/scaling.py --counts 1 4 7 --contenders "scaled sum"

The first 1 to 7 categories are merged, 6 to 40 trained concepts; IP is the mean over those merged,
where safe prompts have lost 2 points. Curves go to benchmarks/results/merge/scaling/N as soon as
they are measured, table and picture to docs/merging_scaling.md and .png.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from benchmarks.merge.compare import measure, parse_arguments
from benchmarks.merge.curves import LOSS
from benchmarks.merge.report import RESULTS, Read, in_percent, ip_with_interval, read_curves
from safetydpo_jax.emoji.concepts import HARMS
from safetydpo_jax.errors import run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[2]
STAGE = "scaling"
COUNTS = tuple(range(1, len(CATEGORIES) + 1))
Reads = dict[str, dict[int, Read]]


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing, then writes table and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, choices=COUNTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR")
    args, others = parser.parse_known_args(argv)  # the others are compare.py's
    pipeline = load_pipeline("emoji")
    for count in args.counts:
        options = [
            "--stage", STAGE, "--categories", *CATEGORIES[:count],
            "--results", str(RESULTS / STAGE / str(count)), *others,
        ]  # fmt: skip
        measure(parse_arguments(options), pipeline)
    read: Reads = {}
    for count in COUNTS:
        for curve in read_curves(RESULTS / STAGE / str(count)):
            read.setdefault(curve.name, {})[count] = ip_with_interval(curve, LOSS)
    content = table(read)
    print(content)
    write_file(args.out / "merging_scaling.md", content.encode())
    plot(read, args.out / "merging_scaling.png")
    print(f"written: {args.out / 'merging_scaling.md'}, merging_scaling.png")


def concepts(count: int) -> int:
    """How many unsafe concepts the first categories' experts were trained on."""
    return sum(not pair.held_out for c in CATEGORIES[:count] for pair in HARMS[c].concepts)


def table(read: Reads) -> str:
    """IP with intervals, a row a number of categories; Markdown."""
    lines = [f"| categories | concepts | {' | '.join(read)} |", "|---" * (2 + len(read)) + "|"]
    for count in sorted({count for found in read.values() for count in found}):
        cells = ["-"] * len(read)
        for i, found in enumerate(read.values()):
            if count in found:
                cells[i] = in_percent(found[count])
        lines.append(f"| {count} | {concepts(count)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(read: Reads, path: Path) -> None:
    """IP against the number of categories, a line a contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for name, found in read.items():
        counts = sorted(found)
        values, low, high = 100 * np.array([found[count][:3] for count in counts]).T
        spread = np.maximum([values - low, high - values], 0)
        axis.errorbar(counts, values, spread, fmt="o-", ms=4, lw=1, capsize=3, label=name)
    axis.set(
        xlabel="categories merged (concepts)", ylabel="IP at 2 points lost, %", ylim=(0, 100),
        xticks=COUNTS, xticklabels=[f"{count} ({concepts(count)})" for count in COUNTS],
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
