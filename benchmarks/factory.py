"""The factory at its full size: by one process, and by two of a job that is killed again and again.

    python benchmarks/factory.py --work FOLDER [--kills 3] [--config.pairs.num_pairs=700 ...]

Both make pair sets and caches of the embedded world from its list of concepts; what they end with
is compared, as hashes of the decoded fields. Writes benchmarks/results/factory.json. What is in
FOLDER is taken up: it can be stopped at any time.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

from benchmarks.machine import machine
from safetydpo_jax.data import Cache, PairSet
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "factory.json"
KILL_WITHIN = 60.0, 500.0  # seconds from the start of a process


def main() -> None:
    """Makes both, compares them and notes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=3, help="of both processes at once")
    args, options = parser.parse_known_args()
    args.work.mkdir(parents=True, exist_ok=True)
    log = args.work / "whole.log"
    if "\nto train" not in (log.read_text() if log.is_file() else ""):
        with log.open("w") as file:
            start(args.work / "whole", options, file).wait()
    seconds = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+) s$", log.read_text(), re.MULTILINE))
    killed = interrupted(args.work, options, args.kills)
    found = [contents(args.work / name) for name in ("whole", "parts")]
    result = {
        "machine": machine(),
        "options": options,
        "seconds_of_one_process": {name: float(value) for name, value in seconds.items()},
        "killed_after_seconds": killed,
        "pairs": {name: counts for name, (counts, *_) in found[0].items()},
        "hashes": {name: hashes for name, (_, *hashes) in found[0].items()},
        "same_by_two_killed_processes": found[0] == found[1],
    }
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1), f"written: {RESULT}", sep="\n")


def interrupted(work: Path, options: list[str], kills: int) -> list[float]:
    """Lets two processes of a job make the same, killed at random; after how many seconds each."""
    notes = work / "kills.json"
    killed = json.loads(notes.read_text()) if notes.is_file() else []
    while True:
        with (work / "part_0.log").open("a") as first, (work / "part_1.log").open("a") as second:
            parts = start_job(work / "parts", options, (first, second))
        wait = random.uniform(*KILL_WITHIN) if len(killed) < kills else None
        try:
            for part in parts:
                if part.wait(timeout=wait):
                    raise UserError(f"a process failed: see part_0.log and part_1.log in {work}")
            return killed
        except subprocess.TimeoutExpired:
            for part in parts:
                part.send_signal(signal.SIGKILL)
                part.wait()
            killed.append(round(wait or 0, 1))
            write_file(notes, json.dumps(killed).encode())
            print(f"killed {len(killed)} of {kills} times", flush=True)


def start(workdir: Path, options: list[str], output, **environment: str) -> subprocess.Popen:
    """Starts launch/generate.py on one device, unless the environment says more."""
    command = [sys.executable, str(ROOT / "launch" / "generate.py"), "--config=coprov2"]
    return subprocess.Popen(
        [*command, *options, f"--workdir={workdir}"],
        env=os.environ | {"XLA_FLAGS": ""} | environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_job(workdir: Path, options: list[str], outputs) -> list[subprocess.Popen]:
    """Starts two as Slurm would: jax.distributed finds out which is which."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"JAX_COORDINATOR_PORT": port}
    return [
        start(
            workdir,
            [*options, "--part=auto"],
            output,
            **job,
            SLURM_PROCID=str(i),
            SLURM_LOCALID=str(i),
        )
        for i, output in enumerate(outputs)
    ]


def contents(workdir: Path) -> dict[str, tuple[list[int], str, str]]:
    """By category: pairs and other pictures, and hashes of the fields of both and of the cache."""
    found = {}
    for card in sorted(workdir.glob("pairs/*/card.json")):
        name = card.parent.name
        pairs, cache = PairSet(card.parent, verify=True), Cache(workdir / name / "cache")
        of_pairs, of_cache = hashlib.sha256(), hashlib.sha256(cache.key.encode())
        for split in pairs.sizes:
            for picture in pairs.pictures(split):
                said = (split, picture.id, picture.prompt, picture.seed, picture.pixels.shape)
                of_pairs.update(repr(said).encode() + picture.pixels.tobytes())
        records = cache.read(np.arange(2 * cache.num_pairs + cache.num_preserve))
        for leaf in jax.tree.leaves((records, cache.null)):
            of_cache.update(leaf.tobytes())
        counts = [pairs.num_pairs, pairs.num_preserve]
        found[name] = counts, of_pairs.hexdigest(), of_cache.hexdigest()
    return found


if __name__ == "__main__":
    run_main(main)
