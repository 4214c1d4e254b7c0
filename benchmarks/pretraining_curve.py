"""The curve of a pretraining run, small enough for the repository.

    python benchmarks/pretraining_curve.py --workdir runs/emoji_base [--note "what was special"]

Reads every stage's settings and metrics.jsonl and writes
benchmarks/results/emoji_base_training.json: what each stage was made from, at most 60 points of its
curve, every validation figure, and its training time. Give several workdirs, in order, where a run
began with the model of the one before (config.init).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine
from safetydpo_jax.errors import MissingFileError, run_main
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
POINTS = 60


def main() -> None:
    """Reads the run and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [Path("runs/emoji_base")]
    parser.add_argument("--workdir", type=Path, nargs="+", default=default, metavar="DIR")
    parser.add_argument("--note", action="append", default=[], help="kept with the result")
    args = parser.parse_args()
    result = {
        "notes": args.note,
        "machine": machine(),
        "runs": [read_run(workdir) for workdir in args.workdir],
    }
    path = ROOT / "benchmarks" / "results" / "emoji_base_training.json"
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    for name, stage in (item for run in result["runs"] for item in run.items()):
        print(f"{name}: {stage['steps']} steps in {stage['minutes']} min")
    print(f"written: {path}")


def read_run(workdir: Path) -> dict[str, Any]:
    """The stages that a run trained, by name; an autoencoder that it took over is none."""
    run = {"denoiser": read_stage(workdir / "denoiser")}
    if (workdir / "autoencoder").exists():
        run = {"autoencoder": read_stage(workdir / "autoencoder"), **run}
    return run


def read_stage(folder: Path) -> dict[str, Any]:
    """One stage's settings and curve; steps that a killed run made twice count once."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise MissingFileError(
            f"{metrics}: missing; give the folder of a run of launch/pretrain.py"
        )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    curve = {line["step"]: line for line in lines if "seconds" in line}
    validation = {line["step"]: line for line in lines if "seconds" not in line}
    # Seconds count from where a process began: a smaller value starts the next one's count.
    seconds, before = 0.0, 0.0
    for line in curve.values():
        now = line["seconds"]
        seconds += now - before if now >= before else now
        before = now
    steps = sorted(curve)
    kept = steps[:: max(1, -(-len(steps) // POINTS))] + steps[-1:]
    settings = json.loads((folder / "settings.json").read_text())
    # Where it lay on this machine says nothing elsewhere.
    settings["init.path"] = Path(settings.get("init.path", "")).name
    return {
        "settings": settings,
        "steps": steps[-1],
        "minutes": round(seconds / 60, 1),
        "curve": [_rounded(curve[step]) for step in dict.fromkeys(kept)],
        "validation": [_rounded(line) for _, line in sorted(validation.items()) if len(line) > 1],
    }


def _rounded(line: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") if key != "step" else value for key, value in line.items()}


if __name__ == "__main__":
    run_main(main)
