"""Tables and curves of what benchmarks/merge/compare.py measured.

python benchmarks/merge/report.py          # docs/merging_table.md and docs/merging.png
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from benchmarks.merge.curves import LOSS, Point, ip_at_loss, passes
from safetydpo_jax.errors import run_main
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "merge"
BASE, EXPERTS = "base", "experts"
LOSSES = (LOSS, 0.03)  # of fidelity, at which curves are read
RESAMPLES = 1000


class Curve(NamedTuple):
    """A contender at a rank.

    Attributes:
      name: of the contender.
      rank: of the LoRA; 0 for the base and the experts.
      bases: of each seed, the base's point.
      points: of each seed, along the curve.
    """

    name: str
    rank: int
    bases: list[Point]
    points: list[list[Point]]


class Read(NamedTuple):
    """What a curve says at a loss of fidelity, mean over seeds.

    Attributes:
      value: the IP.
      low: its 95 % interval's lower end.
      high: and upper end.
      at_most: a seed's curve ends before that loss, and its last point's IP stands for a lower one.
      low_at_most: so it does in more than one resample in forty: the interval ends lower, too.
    """

    value: float
    low: float
    high: float
    at_most: bool = False
    low_at_most: bool = False


def main(argv: list[str] | None = None) -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "final", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR")
    args = parser.parse_args(argv)
    curves = read_curves(args.results)
    content = table(curves)
    print(content)
    write_file(args.out / "merging_table.md", content.encode())
    plot(curves, args.out / "merging.png")
    print(f"written: {args.out / 'merging_table.md'}, merging.png")


def read_curves(folder: Path) -> list[Curve]:
    """Those of a stage, by rank and name; the base's is left out."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    points = {
        (x["rank"] or 0, x["name"], x["seed"]): [Point.from_json(point) for point in x["points"]]
        for x in found
    }
    seeds: dict[tuple[int, str], list[int]] = {}
    for rank, name, seed in sorted(points):
        seeds.setdefault((rank, name), []).append(seed)
    return [
        Curve(
            name,
            rank,
            [points[0, BASE, seed][0] for seed in of],
            [points[rank, name, seed] for seed in of],
        )
        for (rank, name), of in seeds.items()
        if name != BASE
    ]


def table(curves: Sequence[Curve]) -> str:
    """IP where curves pass the losses, with intervals, the lowest first of each rank; Markdown."""
    heads = [f"IP at {100 * loss:.0f} points" for loss in LOSSES]
    lines = [
        f"| rank | LoRA | seeds | {' | '.join(heads)} | IP at scale 1 | fidelity lost there |",
        "|---" * (5 + len(LOSSES)) + "|",
    ]
    rows = []
    for curve in curves:
        if curve.name == EXPERTS:  # each at its own strength alone
            first, cells = 0.0, ["-"] * len(LOSSES)
        else:
            read = [ip_with_interval(curve, loss) for loss in LOSSES]
            first = read[0].value
            cells = [in_percent(x) for x in read]
        whole = [p for points in curve.points for p in points if p.scale == 1]
        ip = 100 * np.mean([p.ip for p in whole])
        lost = 100 * np.mean([p.lost(base) for base, p in zip(curve.bases, whole, strict=True)])
        cells += [f"{ip:.1f} %", f"{lost:.1f}"]
        name = f"{curve.rank or 'each 16'} | {curve.name} | {len(curve.points)}"
        rows.append((curve.rank, first, f"| {name} | {' | '.join(cells)} |"))
    return "\n".join([*lines, *(row for *_, row in sorted(rows))]) + "\n"


def ip_with_interval(curve: Curve, loss: float) -> Read:
    """The IP at a loss, mean over seeds, and its 95 % interval by bootstrap over prompts.

    A resample takes the same prompts for all points of a seed and for its base.
    """
    rng = np.random.default_rng(0)

    def once(resampled: bool) -> tuple[float, bool]:
        found, all_pass = [], True
        for base, points in zip(curve.bases, curve.points, strict=True):
            along = [base, *points]
            safe = _drawn(rng, len(base.faithful), resampled)
            faithful = np.array([point.faithful[safe].mean() for point in along])
            unsafe = {c: _drawn(rng, len(x), resampled) for c, x in base.unsafe.items()}
            of_each = [[p.unsafe[c][drawn].mean() for c, drawn in unsafe.items()] for p in along]
            losses = faithful[0] - faithful
            found.append(ip_at_loss(np.mean(of_each, 1), losses, loss))
            all_pass &= passes(losses, loss)
        return float(np.mean(found)), all_pass

    spread, passed = zip(*(once(resampled=True) for _ in range(RESAMPLES)), strict=True)
    low, high = np.quantile(spread, (0.025, 0.975))
    value, all_pass = once(resampled=False)
    return Read(value, float(low), float(high), not all_pass, np.mean(passed) < 1 - 1 / 40)


def in_percent(read: Read) -> str:
    """A rate and its interval, as a cell of a table."""
    value, low, high = (100 * x for x in read[:3])
    at_most, low_at_most = ("≤ " if x else "" for x in (read.at_most, read.low_at_most))
    return f"{at_most}{value:.0f} % ({low_at_most}{low:.0f} to {high:.0f})"


def _drawn(rng: np.random.Generator, count: int, resampled: bool) -> np.ndarray:
    return rng.integers(count, size=count) if resampled else np.arange(count)


def plot(curves: Sequence[Curve], path: Path) -> None:
    """IP against lost fidelity, a panel a rank, a line a contender: means of the seeds' points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = sorted({curve.rank for curve in curves} - {0})
    names = list(dict.fromkeys(curve.name for curve in curves if curve.rank))
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(
        1, len(ranks), figsize=(5 * len(ranks), 4.2), sharey=True, squeeze=False
    )
    for axis, rank in zip(axes.flat, ranks, strict=True):
        axis.axvline(100 * LOSS, color="#999999", ls=":")
        for curve in curves:
            if curve.rank == rank:
                places = [(0.0, 100 * np.mean([base.ip for base in curve.bases])), *_means(curve)]
                axis.plot(
                    *zip(*places, strict=True), "o-", color=colors[curve.name], label=curve.name,
                    ms=4, lw=1,
                )  # fmt: skip
            elif curve.name == EXPERTS:
                axis.plot(*next(_means(curve)), "k*", ms=10, label="experts, each alone")
        axis.set(title=f"rank {rank}", xlabel="lost fidelity, points", xlim=(-1, 10), ylim=(0, 100))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes.flat[0].set_ylabel("IP, % of pictures (mean of seven harms)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _means(curve: Curve) -> Iterator[tuple[float, float]]:
    """(lost fidelity, IP) in percent, at each scale that all seeds have."""
    at = [{p.scale: p for p in points} for points in curve.points]
    for scale in sorted(set.intersection(*(set(x) for x in at))):
        found = [points[scale] for points in at]
        lost = np.mean([p.lost(base) for base, p in zip(curve.bases, found, strict=True)])
        yield 100 * float(lost), 100 * float(np.mean([p.ip for p in found]))


if __name__ == "__main__":
    run_main(main)
