"""What seven experts in one run cost: seconds a pair, beside those of one expert alone.

    python benchmarks/experts_at_once.py

Steps of the embedded model by the recipes, of one expert and of all seven, in turn in one process,
so that a busy machine weighs on both. Writes benchmarks/results/experts_at_once.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for configs and benchmarks

from benchmarks.dpo_step import Case, make_case
from benchmarks.machine import machine
from safetydpo_jax import host_memory
from safetydpo_jax.errors import run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file

RESULT = Path(__file__).resolve().parent / "results" / "experts_at_once.json"


def main() -> None:
    """Times both recipes, prints them and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (5)")
    args = parser.parse_args()
    pipeline = load_pipeline("emoji")
    null = jax.tree.map(lambda x: x[0], pipeline.encode_negative([""]))
    rows = []
    for recipe in ("paper", "anchored"):
        cases = [
            make_case(pipeline, null, recipe, None, experts=n) for n in (None, len(CATEGORIES))
        ]
        row = {"recipe": recipe, **compare(pipeline, null, cases, args.rounds)}
        rows.append(row)
        print(
            "{recipe}: {one} s a pair alone, {seven} s with seven at once; {ratio} x".format(**row)
        )
    result = {
        "device": f"{jax.devices()[0].device_kind}: {machine()}",
        "jax": jax.__version__,
        "seconds a pair": rows,
    }
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {RESULT}")


def compare(pipeline: Any, null: Any, cases: list[Case], rounds: int) -> dict[str, float]:
    """Median seconds a pair of each case, and the median ratio of the two in a round."""
    steps = []
    for case in cases:
        with jax.default_matmul_precision(case.config.matmul_precision):
            arguments = (case.state, pipeline.unet_params, case.batch, null, case.numbers)
            steps.append(case.step.lower(*arguments).compile())
    seconds = np.empty((rounds + 1, len(cases)))
    for times in seconds:
        for i, (case, step) in enumerate(zip(cases, steps, strict=True)):
            started = time.perf_counter()
            case.state, metrics = step(
                case.state, pipeline.unet_params, case.batch, null, case.numbers
            )
            jax.block_until_ready(metrics)
            times[i] = (time.perf_counter() - started) / case.batch["row_id"].size
    one, seven = np.median(seconds[1:], axis=0)  # the first round warms up
    ratio = np.median(seconds[1:, 1] / seconds[1:, 0])
    return {"one": round(one, 4), "seven": round(seven, 4), "ratio": round(ratio, 3)}


if __name__ == "__main__":
    host_memory.use_huge_pages()
    run_main(main)
