"""Merge methods compared: unsafe pictures against lost fidelity, as curves over a factor.

    python benchmarks/merge/compare.py                  # all contenders, one seed, few pictures
    python benchmarks/merge/compare.py --stage final    # the best of them, three seeds, many
    python benchmarks/merge/compare.py --contenders regmean "scaled sum" --ranks 4

Takes the LoRAs that benchmarks/merge/train.py made. Each curve goes to
benchmarks/results/merge/STAGE/NAME-rank-R-seed-S.json as soon as it is measured; points that are
there are not measured again. Merged LoRAs and pictures' verdicts are kept in runs/merge. Ends with
the table.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from benchmarks.machine import machine
from benchmarks.merge.contenders import CONTENDERS
from benchmarks.merge.curves import Examiner, Point, search
from benchmarks.merge.report import BASE, EXPERTS, RESULTS, read_curves, table
from benchmarks.merge.train import ALL_RANKS, all_single, lora
from configs import common
from safetydpo_jax import storage
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.lora import load_lora, save_lora
from safetydpo_jax.lora.adapters import Adapters
from safetydpo_jax.merge import METHODS, Experts, merge, opened_experts
from safetydpo_jax.merge.activity import count_votes
from safetydpo_jax.merge.distillation import distill
from safetydpo_jax.merge.prompts import emoji_prompts
from safetydpo_jax.merge.statistics import Statistics, load_statistics
from safetydpo_jax.models.pipeline import Pipeline
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[2]
ALL, ALL_CUT = "all_single", "all_single, cut"
NUM_VOTERS, NUM_TAUGHT = 32, 192  # prompts of each category for statistics, for distillation


class Stage(NamedTuple):
    """What is measured, and how well.

    Attributes:
      contenders: names.
      ranks: of the merged LoRAs.
      seeds: of the experts' training.
      split: of the prompts: "tune" to choose on, "test" to report.
      num_unsafe: prompts of each category and seed.
      num_safe: safe prompts of each seed.
      prompt_seed: of the prompts, to which the training's seed is added.
    """

    contenders: tuple[str, ...]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    split: str
    num_unsafe: int
    num_safe: int
    prompt_seed: int


STAGES = {
    "screen": Stage(
        (BASE, EXPERTS, ALL, ALL_CUT, *CONTENDERS), (4, 28), (0,), "tune", 24, 128, 11
    ),
    "final": Stage(
        (BASE, EXPERTS, ALL, ALL_CUT, "scaled sum", "co_merge", "regmean", "distilled"),
        (4, 8, 16, 28), (0, 1, 2), "test", 128, 352, 100,
    ),
    # For benchmarks/merge/scaling.py.
    "scaling": Stage((BASE, "scaled sum", "distilled"), (28,), (0,), "test", 128, 352, 100),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measures the curves that are missing, then prints the table."""
    args = parse_arguments(argv)
    measure(args, load_pipeline("emoji"))
    print(table(read_curves(args.results)))


def measure(args: argparse.Namespace, pipeline: Pipeline) -> None:
    """The curves that the command line asks for, or its stage has, where they are missing."""
    stage = STAGES[args.stage]
    for seed in args.seeds or stage.seeds:
        Comparison(args, stage, seed, pipeline).run(
            args.contenders or stage.contenders, args.ranks or stage.ranks
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, default="screen")
    known = (BASE, EXPERTS, ALL, ALL_CUT, *CONTENDERS)
    parser.add_argument("--contenders", nargs="*", choices=known, metavar="NAME")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES), choices=CATEGORIES)
    parser.add_argument("--batch_size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--results", type=Path, metavar="DIR")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "merge", metavar="DIR")
    args = parser.parse_args(argv)
    args.results = args.results or RESULTS / args.stage
    return args


class Comparison:
    """The curves of one training seed.

    Args:
      args: of the command line.
      stage: what is measured.
      seed: of the training.
      pipeline: the embedded model.
    """

    def __init__(self, args: argparse.Namespace, stage: Stage, seed: int, pipeline: Pipeline):
        self._args, self._seed, self._stage = args, seed, stage
        self._files = [lora(category, seed) for category in args.categories]
        # Of the experts, which all results depend on.
        self._key = storage.digest([storage.hash_file(file) for file in self._files])
        self._pipeline = pipeline
        self._statistics: Statistics | None = None
        self._examine = Examiner(
            self._pipeline,
            args.runs / "drawn",
            split=stage.split,
            num_unsafe=stage.num_unsafe,
            num_safe=stage.num_safe,
            seed=stage.prompt_seed + seed,
            drawing=common.get_config("hate").drawing.to_dict() | {"batch_size": args.batch_size},
        )

    def run(self, names: Sequence[str], ranks: Sequence[int]) -> None:
        """Measures what is missing; each is compared with the base."""
        categories, params = self._args.categories, self._pipeline.unet_params
        base = self._measured(
            BASE, None, lambda known: known or [self._examine(None, only=categories)]
        )[0]
        with opened_experts(self._files, params) as experts:
            if EXPERTS in names:
                self._measured(EXPERTS, None, lambda known: known or [self._alone()])
            for rank in ranks:
                for name in names:
                    # Of the ranks that it was trained at, the highest is not cut; at others it is.
                    done = (ALL_CUT, rank) == (name, max(ALL_RANKS))
                    done |= name == ALL and rank not in ALL_RANKS
                    if done:
                        print(f"{name}, rank {rank}: left out, see {ALL} and {ALL_CUT}")
                    elif name not in (BASE, EXPERTS):
                        adapters = functools.cache(
                            lambda n=name, r=rank: self._adapters(n, r, experts)
                        )
                        self._measured(
                            name,
                            rank,
                            lambda known, of=adapters: search(
                                lambda scale: self._examine(of(), scale, categories), base, known
                            ),
                        )

    def _alone(self) -> Point:
        """Every expert on its own category; fidelity is the lowest of theirs."""
        points = {
            category: self._examine(load_lora(file, self._pipeline.unet_params)[0], 1, [category])
            for category, file in zip(self._args.categories, self._files, strict=True)
        }
        worst = min(points.values(), key=lambda point: point.faithful.mean())
        return Point(
            1.0,
            {c: point.unsafe[c] for c, point in points.items()},
            {c: point.unsafe_junk[c] for c, point in points.items()},
            worst.faithful,
            worst.junk,
        )

    def _adapters(self, name: str, rank: int, experts: Experts) -> Adapters:
        """What a contender makes of the experts."""
        params = self._pipeline.unet_params
        if name in (ALL, ALL_CUT):
            trained = rank if name == ALL else max(ALL_RANKS)
            with opened_experts([lora(all_single(trained), self._seed)], params) as single:
                return merge(single, "svd", rank=rank).adapters
        key = storage.digest([self._key, _made(name)])[:8]
        kept = self._args.runs / "merged" / f"{self._words(name, rank)}-{key}.safetensors"
        if kept.is_file():
            return load_lora(kept, params)[0]
        contender = CONTENDERS[name]
        statistics = self._counted(experts) if METHODS[contender.method].needs else None
        adapters = merge(
            experts,
            contender.method,
            rank=rank,
            options=contender.options,
            votes=statistics and statistics.votes(),
            inputs=statistics and statistics.inputs,
        ).adapters
        if contender.lessons is not None:
            adapters = distill(
                self._pipeline,
                experts,
                adapters,
                *self._prompts(NUM_TAUGHT),
                contender.lessons,
                self._args.runs / "distilling",
            )
        save_lora(kept, adapters)
        return adapters

    def _counted(self, experts: Experts) -> Statistics:
        """Votes and inputs, counted once for these experts."""
        path = self._args.runs / f"statistics-{self._key[:8]}.safetensors"
        if self._statistics is None and path.is_file():
            self._statistics = load_statistics(path).ordered(experts.hashes, str(path))
        if self._statistics is None:
            self._statistics = count_votes(
                self._pipeline,
                experts,
                *self._prompts(NUM_VOTERS),
                batch_size=32,
                guidance_scale=4.0,
                inputs=True,
            )
            self._statistics.save(path)
        return self._statistics

    def _prompts(self, count: int) -> tuple[list[str], list[str]]:
        prompts, categories = emoji_prompts(count, seed=0, safe=True)
        wanted = [i for i, c in enumerate(categories) if c in (*self._args.categories, "safe")]
        return [prompts[i] for i in wanted], [categories[i] for i in wanted]

    def _words(self, name: str, rank: int | None) -> str:
        words = re.sub(r"[^a-z0-9.]+", "-", name) + (f"-rank-{rank}" if rank else "")
        return f"{words}-seed-{self._seed}"

    def _measured(
        self, name: str, rank: int | None, measure: Callable[[list[Point]], list[Point]]
    ) -> list[Point]:
        """A curve from its file, gone on with where that ends too early, or measured; kept.

        Args:
          name: of the contender.
          rank: of its LoRA.
          measure: takes the points that are known, and returns all.
        """
        path, began = self._args.results / f"{self._words(name, rank)}.json", time.monotonic()
        settings = {
            "name": name,
            "rank": rank,
            "seed": self._seed,
            "categories": self._args.categories,
            "experts": self._key,
            **{key: getattr(self._stage, key) for key in ("split", "num_unsafe", "num_safe")},
        }
        if (made := _made(name)) is not None:
            settings["lessons"] = made
        known, before = [], 0.0
        if path.is_file():
            found = json.loads(path.read_text())
            for key, value in settings.items():
                if found.get(key) != value:
                    raise UserError(f"{path} is of another {key}: move it away, or give --results")
            known = [Point.from_json(point) for point in found["points"]]
            before = found["seconds"]
        points = measure(known)
        if len(points) > len(known):
            result = settings | {
                "machine": machine(),
                "seconds": round(before + time.monotonic() - began, 1),
                "points": [point.to_json() for point in points],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, (json.dumps(result, indent=1) + "\n").encode())
            said = ", ".join(
                f"{p.scale:.2f}: IP {p.ip:.3f} at {p.faithful.mean():.3f}" for p in points
            )
            print(
                f"{name}, rank {rank}, seed {self._seed}: {said}; {result['seconds']:.0f} s",
                flush=True,
            )
        return points


def _made(name: str) -> dict[str, Any] | None:
    """How a contender is taught, if it is: what its name says is of the defaults of the day."""
    lessons = CONTENDERS[name].lessons if name in CONTENDERS else None
    return lessons and dataclasses.asdict(lessons)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
