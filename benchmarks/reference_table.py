"""What tables of the base's answers save of a DPO step, and what a draw of them costs.

    python benchmarks/reference_table.py
    python benchmarks/reference_table.py --recipe anchored
    python benchmarks/reference_table.py --model runs/true_size/sd15 --pixels 256  # one pair a step

The step with the tables and the step without take turns, with the forward passes that fill the rows
of a batch, in one run. Writes benchmarks/results/reference_table_MODEL.json, or ..._anchored.json.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and configs

from benchmarks.dpo_step import make_case
from benchmarks.machine import machine
from safetydpo_jax import host_memory
from safetydpo_jax.errors import run_main
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file
from safetydpo_jax.train.reference import make_answers

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
    """Times the three, prints and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--recipe", choices=("paper", "anchored"), default="paper")
    parser.add_argument("--pixels", type=int, help="side of the pictures; one pair a step")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(argv)
    pipeline = load_pipeline(args.model)
    null = jax.tree.map(lambda x: x[0], pipeline.encode_negative([""]))
    for name in set(pipeline.params) - {"unet"}:
        del pipeline.params[name]
    gc.collect()
    case = make_case(pipeline, null, args.recipe, args.pixels)
    params, pairs = pipeline.unet_params, case.config.batch_size
    answers = make_answers(pipeline, case.config, case.mesh)
    asked = {"errors": case.batch}
    if args.recipe == "anchored":
        asked |= {"wanted": case.batch, "preserved": case.batch["preserve"]}

    def answer() -> dict[str, Any]:
        return {name: answers[name](params, batch, null) for name, batch in asked.items()}

    state = case.state

    def step(batch: dict[str, Any]) -> Any:
        nonlocal state
        state, metrics = case.step(state, params, batch, null, case.numbers)
        return metrics

    jax.config.update("jax_default_matmul_precision", case.config.matmul_precision)
    known = case.batch | {"reference": jax.tree.map(np.asarray, answer())}
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: step(case.batch),
        "step_with_table": lambda: step(known),
        "draw": answer,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.turns + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first compiles
                seconds[name].append((time.perf_counter() - began) / pairs)
    median = {name: float(np.median(of_call)) for name, of_call in seconds.items()}
    result = {
        "machine": machine(),
        "model": Path(args.model).name,
        "recipe": args.recipe,
        "pixels": args.pixels or pipeline.resolution,
        "pairs": pairs,
        "seconds_a_pair": {name: round(x, 4) for name, x in median.items()},
        "saved": round(1 - median["step_with_table"] / median["step"], 3),
        # From so many visits of a row on, a table of one run alone is worth its draws.
        "draws_paid_by_visits": round(
            median["draw"] / (median["step"] - median["step_with_table"]), 2
        ),
    }
    name = result["model"] if args.recipe == "paper" else f"{result['model']}_{args.recipe}"
    path = ROOT / "benchmarks" / "results" / f"reference_table_{name}.json"
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1), f"written: {path}", sep="\n")


if __name__ == "__main__":
    host_memory.use_huge_pages()
    run_main(main)
