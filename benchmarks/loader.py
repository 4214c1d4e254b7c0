"""How many cached pairs of Stable Diffusion 1.5 the loader reads from the disk in a second.

    python benchmarks/loader.py

The cache has random moments and text states in the true shapes, half precision, with mirror images;
it is larger than what is held in memory. Writes benchmarks/results/loader.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and configs

from benchmarks.machine import machine
from configs import common
from safetydpo_jax import storage
from safetydpo_jax.data import Cache, batches
from safetydpo_jax.data.cache import FORMAT, NULL, shard_name
from safetydpo_jax.data.encode import RECORDS
from safetydpo_jax.errors import run_main

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "loader.json"
MOMENTS, STATES = (2, 2, 64, 64, 4), (77, 768)
PER_SHARD = 128


def main(argv: list[str] | None = None) -> None:
    """Writes the cache to a temporary folder and reads it at several batch sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of reading, each")
    parser.add_argument("--folder", help="for the temporary files: the disk that is measured")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        folder = Path(work) / "cache"
        write_cache(folder, args.pairs)
        cache = Cache(folder)
        result: dict[str, Any] = {
            "machine": machine(),
            "gigabytes": round(sum(f.stat().st_size for f in folder.iterdir()) / 1e9, 2),
            "pairs": args.pairs,
            "pairs_a_second": {
                f"{rows}, batch {size}": round(rate(cache, rows, size, args.seconds))
                for rows in ("unsafe_prompt", "both")
                for size in (16, 128)
            },
        }
    storage.write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1), f"written: {RESULT}", sep="\n")


def write_cache(folder: Path, num_pairs: int) -> None:
    """Random records; a few different ones, as the disk does not care."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"moments": MOMENTS, "prompt_embeds": STATES}
    records = [
        safetensors.numpy.save({k: rng.normal(size=s).astype("f2") for k, s in shapes.items()})
        for _ in range(16)
    ]
    count = 2 * num_pairs
    shards = -(-count // PER_SHARD)
    for shard in range(shards):
        writer = ArrayRecordWriter(str(folder / shard_name(shard, shards)), RECORDS)
        for i in range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, count)):
            writer.write(records[i % len(records)])
        writer.close()
    null = {"prompt_embeds": np.zeros(STATES, np.float32)}
    (folder / NULL).write_bytes(safetensors.numpy.save(null))
    storage.write_card(
        folder,
        {"format": FORMAT, "key": "random", "num_pairs": num_pairs, "num_preserve": 0, "parts": {}}
        | {"records_per_shard": PER_SHARD, "dtype": "float16", "flip": True},
    )
    os.sync()


def rate(cache: Cache, rows: str, size: int, seconds: float) -> float:
    """Pairs a second, in float32 as a step takes them, after a first batch."""
    config = common.get_config("hate", "sd15")
    config.rows, config.batch_size, config.accumulation = rows, size, 1
    config.preserve_batch_size = 0
    steps = batches(cache, config)
    next(steps)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        count += len(next(steps)["row_id"])
    return count / (time.monotonic() - began)


if __name__ == "__main__":
    run_main(main)
