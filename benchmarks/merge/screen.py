"""All merge methods on one training seed and few pictures: which ones are worth a closer look.

    python benchmarks/merge/screen.py                                # what is missing
    python benchmarks/merge/screen.py --contenders regmean "scaled sum" --ranks 4

Takes the LoRAs that benchmarks/merge/train.py made. Each curve goes to
benchmarks/results/merge/screen/NAME-rank-R.json as soon as it is measured; pictures' verdicts are
kept in runs/merge/drawn. Ends with the table of all that is there.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from benchmarks.machine import machine
from benchmarks.merge.contenders import CONTENDERS
from benchmarks.merge.curves import LOSS, Examiner, Point, ip_at_loss, search
from benchmarks.merge.train import ALL, lora
from configs import common
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.lora import load_lora
from safetydpo_jax.merge import merge, opened_experts
from safetydpo_jax.merge.activity import count_votes
from safetydpo_jax.merge.prompts import emoji_prompts
from safetydpo_jax.merge.statistics import Statistics, load_statistics
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "merge" / "screen"
RANKS = (4, 28)
SPLIT, SEED = "tune", 11  # of the prompts
NUM_UNSAFE, NUM_SAFE = 24, 128  # prompts of each category, safe ones
NUM_VOTERS = 32  # prompts of each category for the statistics


def main(argv: list[str] | None = None) -> None:
    """Measures the curves that are missing, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["base", "experts", ALL, *CONTENDERS]
    parser.add_argument("--contenders", nargs="*", choices=names, default=names, metavar="NAME")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES), choices=CATEGORIES)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "merge", metavar="DIR")
    args = parser.parse_args(argv)
    pipeline = load_pipeline("emoji")
    examine = Examiner(
        pipeline,
        args.runs / "drawn",
        split=SPLIT,
        num_unsafe=NUM_UNSAFE,
        num_safe=NUM_SAFE,
        seed=SEED,
        drawing=common.get_config("hate").drawing.to_dict(),
    )
    files = [lora(category, 0) for category in args.categories]
    base = read_or_measure(args, "base", lambda: [examine(None, only=args.categories)])[0]
    with opened_experts(files, pipeline.unet_params) as experts:
        if "experts" in args.contenders:
            read_or_measure(args, "experts", lambda: [alone(examine, pipeline, args.categories)])
        statistics = None
        for name in args.contenders:
            if name in ("base", "experts"):
                continue
            for rank in args.ranks:
                if result_file(args, name, rank).is_file():
                    continue
                if name == ALL:
                    with opened_experts([lora(ALL, 0)], pipeline.unet_params) as single:
                        adapters = merge(single, "task_arithmetic", rank=rank).adapters
                else:
                    statistics = statistics or statistics_of(pipeline, experts, args.runs)
                    adapters = merge(
                        experts,
                        CONTENDERS[name].method,
                        rank=rank,
                        options=CONTENDERS[name].options,
                        votes=statistics.votes(),
                        inputs=statistics.inputs,
                    ).adapters
                read_or_measure(
                    args,
                    name,
                    lambda adapters=adapters: search(
                        lambda scale: examine(adapters, scale, args.categories), base
                    ),
                    rank,
                )
    print(table(args, base))


def alone(examine: Examiner, pipeline: Any, categories: list[str]) -> Point:
    """Every expert on its own category; fidelity is the lowest of theirs."""
    points = {
        c: examine(load_lora(lora(c, 0), pipeline.unet_params)[0], only=[c]) for c in categories
    }
    worst = min(points.values(), key=lambda point: point.faithful.mean())
    return Point(
        1.0,
        {c: point.unsafe[c] for c, point in points.items()},
        {c: point.unsafe_junk[c] for c, point in points.items()},
        worst.faithful,
        worst.junk,
    )


def statistics_of(pipeline: Any, experts: Any, runs: Path) -> Statistics:
    """Votes and inputs, counted once for these experts."""
    path = runs / f"statistics-{len(experts.files)}-{experts.hashes[0][:8]}.safetensors"
    if path.is_file():
        return load_statistics(path).ordered(experts.hashes, str(path))
    prompts, categories = emoji_prompts(NUM_VOTERS, seed=0, safe=True)
    wanted = [i for i, c in enumerate(categories) if c in (*experts.names, "safe")]
    found = count_votes(
        pipeline,
        experts,
        [prompts[i] for i in wanted],
        [categories[i] for i in wanted],
        batch_size=32,
        guidance_scale=4.0,
        inputs=True,
    )
    found.save(path)
    return found


def result_file(args: argparse.Namespace, name: str, rank: int | None) -> Path:
    """Where a curve is kept."""
    words = re.sub(r"[^a-z0-9.]+", "-", name) + (f"-rank-{rank}" if rank else "")
    return args.results / f"{words}.json"


def read_or_measure(
    args: argparse.Namespace, name: str, measure: Any, rank: int | None = None
) -> list[Point]:
    """A curve from its file, or measured and kept."""
    path, began = result_file(args, name, rank), time.monotonic()
    if not path.is_file():
        points = measure()
        result = {
            "name": name,
            "rank": rank,
            "categories": args.categories,
            "split": SPLIT,
            "seed": SEED,
            "machine": machine(),
            "seconds": round(time.monotonic() - began, 1),
            "points": [point.to_json() for point in points],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(result, indent=1) + "\n").encode())
        said = ", ".join(f"{p.scale:.2f}: IP {p.ip:.3f} at {p.faithful.mean():.3f}" for p in points)
        print(f"{name}, rank {rank}: {said}; {result['seconds']:.0f} s", flush=True)
    found = json.loads(path.read_text())
    if found["categories"] != args.categories:
        raise UserError(f"{path} is of other categories: give another --results")
    return [Point.from_json(point) for point in found["points"]]


def table(args: argparse.Namespace, base: Point) -> str:
    """IP where `LOSS` of fidelity is lost, the lowest first."""
    rows = []
    for path in sorted(args.results.glob("*.json")):
        found = json.loads(path.read_text())
        points = [base, *(Point.from_json(x) for x in found["points"])]
        ips = np.array([point.ip for point in points])
        losses = np.array([base.faithful.mean() - point.faithful.mean() for point in points])
        rows.append((found["rank"] or 0, ip_at_loss(ips, losses), found["name"]))
    lines = [f"rank  IP at a loss of {LOSS:.0%}"]
    return "\n".join(lines + [f"{rank:4d}  {ip:.3f}  {name}" for rank, ip, name in sorted(rows)])


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
