"""What the second start of a training compiles in, thanks to the first's compile cache.

    python benchmarks/second_start.py

Trains the hate expert on the embedded model for three steps in a new workdir and with an empty
cache; then again in other workdirs with what the first one compiled, once the very same and once
with other numbers that are no part of the program. The step has tables of the base's answers, so
that no reference pass is in it. Seconds are those of the phase "compile", which
traces, compiles or fetches, and counts FLOPs. Writes benchmarks/results/second_start.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

from benchmarks.machine import machine
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "second_start.json"
OPTIONS = {
    "pairs.num_pairs": 16,
    "pairs.preserve_count": 16,
    "steps": 3,
    "reference.draws": 1,
    "health.every": 0,
    "report.enabled": False,
}
OTHERS = {"loss.beta": 60, "optimizer.learning_rate": 1e-3, "steps": 4}


def main(argv: list[str] | None = None) -> None:
    """Starts it three times, and writes the seconds and their ratios to the first's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        shared = {"pairs.path": f"{place}/first/pairs", "cache.path": f"{place}/first/cache"}
        starts = {"first": {}, "second": shared, "with other numbers": shared | OTHERS}
        for name, changes in starts.items():
            seconds[name] = compile_seconds(Path(place), name.split()[0], OPTIONS | changes)
            print(f"{name}: {seconds[name]} s", flush=True)
    result = {
        "machine": machine(),
        "compile_seconds": seconds,
        "share_of_the_first": {
            name: round(took / seconds["first"], 3) for name, took in seconds.items()
        },
    }
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {RESULT}")


def compile_seconds(place: Path, name: str, options: dict[str, object]) -> float:
    """The seconds of a training's phase "compile", from its own table.

    Raises:
      UserError: it failed.
    """
    command = [sys.executable, ROOT / "launch" / "train.py", "--config", ROOT / "configs/hate.py"]
    command += ["--workdir", place / name]
    command += [f"--config.{key}={value}" for key, value in options.items()]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place / "compiled")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the {name} start failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    (found,) = re.findall(r"^compile +([\d.]+) s$", done.stdout, re.MULTILINE)
    return float(found)


if __name__ == "__main__":
    run_main(main)
