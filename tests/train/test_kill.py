"""The launch script, on a real network, killed for good at any moment."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 24
# Such a model's step takes LLVM longer to make fast than it then runs.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
EXPORT = "export/pytorch_lora_weights.safetensors"


def command(model_folder, pairs_folder, workdir):
    settings = {
        "model": model_folder,
        "pairs.path": pairs_folder,
        "steps": STEPS,
        "batch_size": 4,
        "preserve_batch_size": 4,
        "lora.rank": 2,
        "checkpoint.every": 4,
        "health.every": 0,
        "report.enabled": False,
    }
    return [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"--config={ROOT / 'configs' / 'hate.py'}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
        f"--workdir={workdir}",
    ]


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_kill_9_changes_nothing(model_folder, pairs_folder, tmp_path):
    """Killed before training, at its first step and in the middle: the adapters are the same."""
    environment = os.environ | QUICK | {"XLA_FLAGS": ""}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "cwd": tmp_path}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(model_folder, pairs_folder, whole), check=True, **quiet)
    for moment in (0, 1, 13):
        process = subprocess.Popen(command(model_folder, pairs_folder, killed), **quiet)
        while process.poll() is None and not (
            lines(killed) >= moment if moment else (killed / "cache").exists()
        ):
            time.sleep(0.005)
        assert process.poll() is None
        process.kill()
        process.wait()
        assert not (killed / EXPORT).exists()
    subprocess.run(command(model_folder, pairs_folder, killed), check=True, **quiet)
    assert (killed / EXPORT).read_bytes() == (whole / EXPORT).read_bytes()
    assert lines(killed) == lines(whole) == STEPS
