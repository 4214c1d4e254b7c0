"""Seconds and memory of merging experts of SDXL's size: 560 layers, seven experts of rank 64.

    python benchmarks/merge_time.py
    python benchmarks/merge_time.py --methods task_arithmetic ties --folder /scratch/experts

The experts are random, written once (2.5 GB). Each method runs in a process of its own, which
imports, reads, merges to rank 64 and writes. Peaks are of what the process holds itself; the files
are mapped. Writes benchmarks/results/merge_time.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

from benchmarks.machine import machine
from benchmarks.memory import Memory
from safetydpo_jax.errors import run_main
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "merge_time.json"
EXPERTS, RANK, LAYERS = 7, 64, 560
METHODS = ("task_arithmetic", "co_merge", "orthogonal", "ties", "dare", "magnitude_prune")


def main(argv: list[str] | None = None) -> None:
    """Writes the experts, merges them by each method, and writes what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "merge_time")
    parser.add_argument("--only", choices=METHODS, help="one method, in this process")
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps(measure(args.only, args.folder)))
        return
    files = [args.folder / f"expert{i}.safetensors" for i in range(EXPERTS)]
    for i, file in enumerate(files):
        if not file.is_file():
            write_expert(file, i)
            print(f"written: {file}", flush=True)
    rows = []
    for method in args.methods:
        command = [sys.executable, __file__, "--only", method, "--folder", str(args.folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print("{method}: {seconds} s, {peak_mb} MB, energy kept {energy}".format(**rows[-1]))
    result = {
        "machine": machine(),
        "experts": EXPERTS,
        "layers": LAYERS,
        "rank": RANK,
        "methods": rows,
    }
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {RESULT}")


def shapes() -> Any:
    """Of SDXL's UNet."""
    from safetydpo_jax.lora.base import unet_shapes

    return unet_shapes(ROOT / "safetydpo_jax" / "models" / "published" / "sdxl")


def write_expert(file: Path, seed: int) -> None:
    """Normal numbers on all attention projections."""
    from flax import traverse_util

    from safetydpo_jax import lora
    from safetydpo_jax.lora.adapters import kernels

    tree = shapes()
    layers, rng, flat = kernels(tree), np.random.default_rng(seed), {}
    for layer in lora.module_paths(tree, ("to_q", "to_k", "to_v", r"to_out\.0")):
        path, (rows, columns) = layers[layer]
        flat[(*path, "a")] = rng.standard_normal((rows, RANK), np.float32) / RANK
        flat[(*path, "b")] = rng.standard_normal((RANK, columns), np.float32)
    lora.save_lora(file, traverse_util.unflatten_dict(flat))


def measure(method: str, folder: Path) -> dict[str, Any]:
    """One merge, from files to a file."""
    started = time.monotonic()
    with Memory() as memory:
        from safetydpo_jax.lora import save_lora
        from safetydpo_jax.merge import merge, opened_experts
        from safetydpo_jax.merge.layer import Votes

        files = sorted(folder.glob("expert?.safetensors"))
        with opened_experts(files, shapes()) as experts:
            assert len(experts.places) == LAYERS, len(experts.places)
            votes, rng = {}, np.random.default_rng(0)
            if method == "co_merge":
                votes = {
                    layer: Votes(rng.random((EXPERTS, kernel[-1])), None)
                    for layer, (_, kernel) in experts.places.items()
                }
            merged = merge(experts, method, rank=RANK, votes=votes)
        save_lora(folder / f"{method}.safetensors", merged.adapters)
    return {
        "method": method,
        "seconds": round(time.monotonic() - started, 1),
        "peak_mb": memory.anonymous,
        "energy": round(float(np.mean(list(merged.energy.values()))), 4),
        "error_at_most": round(float(np.max(list(merged.error.values()))), 4),
    }


if __name__ == "__main__":
    run_main(main)
