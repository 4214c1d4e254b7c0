"""One training, whatever the mesh and the processes, and whichever of them is killed.

    python benchmarks/meshes.py                # all: about an hour on two cores
    python benchmarks/meshes.py --kills 2

Runs launch/train.py on the embedded model, in float32. Curves: 50 steps on other meshes, turns and
processes than one device; how far the first gradient is from its, and the losses of steps 1 to 20.
Kills: jobs of 2 and of 4 processes, one of which gets SIGKILL at a random moment, are taken up by
as many processes, and by one; whether the LoRA is that of a job that nothing befell, bit for bit,
or how far from it. Writes benchmarks/results/meshes.json; a row that is there is not run again.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and tests

from benchmarks.machine import machine
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.pace import Pace
from safetydpo_jax.storage import write_file
from tests.train.job import Job

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "meshes.json"
EXPORT = Path("export") / "pytorch_lora_weights.safetensors"
STEPS = 50
# Name -> processes, devices, and what differs in the config. "alone" is what others are held to.
CURVES = {
    "alone": (1, 1, {}),
    "data 2, fsdp 4": (1, 8, {"mesh.data": 2, "mesh.fsdp": 4}),
    "data 4, fsdp 2": (1, 8, {"mesh.data": 4, "mesh.fsdp": 2}),
    "tensor 2": (1, 2, {"mesh.tensor": 2}),
    "accumulation 4": (1, 1, {"accumulation": 4, "batch_size": 2, "preserve_batch_size": 2}),
    "2 processes": (2, 4, {}),
    "4 processes": (4, 4, {}),
}
SETTINGS = {
    "steps": STEPS,
    "batch_size": 8,
    "preserve_batch_size": 8,
    "matmul_precision": "float32",
    "pairs.num_pairs": 32,
    "pairs.preserve_count": 64,
    "checkpoint.every": 5,
    "health.every": 0,
    "report.enabled": False,
}


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing; exits with an error if anything is further apart than it may be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many in all (20)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "meshes", metavar="DIR")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"machine": machine(), "curves": {}, "kills": []}
    if RESULT.is_file():
        result = json.loads(RESULT.read_text())
    if machine() not in result["machine"]:
        result["machine"] += f"; then {machine()}"
    pairs = args.runs / "alone" / "pairs"  # the first run draws them
    for name, (processes, devices, changes) in CURVES.items():
        if name not in result["curves"] or (name == "alone" and not pairs.is_dir()):
            if name != "alone":
                changes = {"pairs.path": pairs, **changes}
            every = {"checkpoint.every": 1, "checkpoint.keep": STEPS}
            run(args.runs / name, processes, devices, every | changes)
            result["curves"][name] = compare(args.runs / name, args.runs / "alone")
            keep(result)
            print(f"{name}: {result['curves'][name]}", flush=True)
    before = len(result["kills"])
    pace = Pace(args.kills - before)
    for number in range(before, args.kills):
        result["kills"].append(kill(args.runs, number, pairs))
        keep(result)
        left = pace.left(number + 1 - before)
        print(f"kill {number + 1}: {result['kills'][-1]}; {left:.0f} s left", flush=True)
    print(f"written: {RESULT}")
    wrong = [name for name, row in result["curves"].items() if not curve_is_same(row)]
    wrong += [f"kill {i}" for i, row in enumerate(result["kills"]) if not kill_is_nothing(row)]
    if wrong:
        raise UserError(f"not the same training: {', '.join(wrong)}")


def keep(result: dict[str, Any]) -> None:
    """Writes what is known so far."""
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())


def curve_is_same(row: dict[str, float]) -> bool:
    """Within what rounding explains."""
    return row["first_gradient"] <= 1e-5 and row["losses_to_20"] <= 1e-3


def kill_is_nothing(row: dict[str, Any]) -> bool:
    """The same bits on as many processes; on one, whose sums are in another order, nearly."""
    return row["same_bits"] and row["by_one_apart"] <= 1e-3


def start(workdir: Path, processes: int, devices: int, changes: dict[str, Any]) -> Job:
    """A job of launch/train.py; what one compiles all find."""
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"--config={ROOT / 'configs' / 'hate.py'}",
        *(f"--config.{key}={value}" for key, value in (SETTINGS | changes).items()),
        f"--workdir={workdir}",
    ]
    programs = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")}
    return Job(processes, command, devices, env=lambda i: programs)


def run(workdir: Path, processes: int, devices: int, changes: dict[str, Any]) -> str:
    """Runs one to its end; returns what its first process said."""
    codes, said = start(workdir, processes, devices, changes).end(timeout=3600)
    if any(codes):
        raise UserError(f"{workdir}: exit codes {codes}; the last words: {said[0][-2000:]}")
    return said[0]


def compare(workdir: Path, alone: Path) -> dict[str, float]:
    """How far, relatively, a run's first gradient and its losses are from those of another."""
    found, wanted = losses(workdir), losses(alone)
    return {
        "first_gradient": apart(first_moments(workdir), first_moments(alone)),
        "losses_to_20": relative(found[:20], wanted[:20]),
        f"losses_to_{STEPS}": relative(found, wanted),
    }


def losses(workdir: Path) -> list[float]:
    """Of each step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def relative(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference."""
    pairs = zip(found, wanted, strict=True)
    return float(f"{max(abs(a - b) / abs(b) for a, b in pairs):.2g}")


def first_moments(workdir: Path) -> np.ndarray:
    """Adam's after one step, which are the first gradient times a number."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        state = manager.restore(1, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    leaves = jax.tree_util.tree_leaves_with_path(state["opt_state"])
    moments = [x for path, x in leaves if any(getattr(key, "key", "") == "mu" for key in path)]
    return np.concatenate([np.ravel(x) for x in moments])


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference over the norm."""
    return float(f"{np.linalg.norm(found - wanted) / np.linalg.norm(wanted):.2g}")


def kill(runs: Path, number: int, pairs: Path) -> dict[str, Any]:
    """Kills one process of a job, and has the job taken up twice."""
    rng = random.Random(number)
    count, step = (2, 4)[number % 2], rng.randrange(STEPS - 5)
    victim = rng.randrange(count)
    changes = {"pairs.path": pairs, "cache.path": runs / "alone" / "cache"}
    whole = runs / f"whole of {count}"
    if not (whole / EXPORT).is_file():
        run(whole, count, 4, changes)
    killed, other = runs / "killed", runs / "killed, by one"
    for folder in (killed, other):
        shutil.rmtree(folder, ignore_errors=True)
    job = start(killed, count, 4, changes)
    metrics = killed / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < step:
        if any(process.poll() is not None for process in job.processes):
            raise UserError(f"it ended before it was killed: {job.end()}")
        time.sleep(0.01)
    time.sleep(0.3 * rng.random())  # in the middle of a step, or of a checkpoint
    job.processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, _ = job.end()
    noticed = time.monotonic() - began
    shutil.copytree(killed, other)
    said = run(killed, count, 4, changes)
    run(other, 1, 4, changes)
    return {
        "processes": count,
        "killed": victim,
        "exit_codes": codes,
        "noticed_seconds": round(noticed, 1),
        "went_on": next((x for x in said.splitlines() if "going on from step" in x), "from 0"),
        "same_bits": (killed / EXPORT).read_bytes() == (whole / EXPORT).read_bytes(),
        "by_one_apart": apart(numbers(other / EXPORT), numbers(whole / EXPORT)),
    }


def numbers(file: Path) -> np.ndarray:
    """All of a LoRA's."""
    import safetensors.numpy

    return np.concatenate([x.ravel() for x in safetensors.numpy.load_file(file).values()])


if __name__ == "__main__":
    run_main(main)
