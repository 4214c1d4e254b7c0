"""The factory from concepts to caches on the embedded world: killed, in parts, over devices."""

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from safetydpo_jax.data import Cache, PairSet, open_pairs
from safetydpo_jax.harm import CATEGORIES

ROOT = Path(__file__).resolve().parents[2]
# Few and quickly drawn, so that the judge drops many.
OPTIONS = (
    "--config=coprov2",
    "--config.pairs.num_pairs=28",
    "--config.pairs.preserve_count=6",
    "--config.drawing.batch_size=8",
    "--config.drawing.num_steps=4",
)

pytestmark = pytest.mark.slow


def start(workdir, *more, **environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch/generate.py"), *OPTIONS, f"--workdir={workdir}", *more],
        env=os.environ | {"XLA_FLAGS": ""} | environment,  # one device, unless it says more
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def contents(workdir):
    """By category, hashes of the decoded fields of pairs and cache, and the card's text."""
    found = {}
    for name in CATEGORIES:
        pairs, cache = (
            PairSet(workdir / "pairs" / name, verify=True),
            Cache(workdir / name / "cache"),
        )
        of_pairs, of_cache = hashlib.sha256(), hashlib.sha256()
        for split in ("unsafe", "safe", "preserve"):
            for picture in pairs.pictures(split):
                said = (split, picture.id, picture.prompt, picture.seed, picture.pixels.shape)
                of_pairs.update(repr(said).encode() + picture.pixels.tobytes())
        records = cache.read(np.arange(2 * cache.num_pairs + cache.num_preserve))
        for leaf in jax.tree.leaves((records, cache.null)):
            of_cache.update(leaf.tobytes())
        found[name] = of_pairs.hexdigest(), of_cache.hexdigest(), cache.key
    return found | {"card": (workdir / "pairs" / "README.md").read_text()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes that nothing befalls, and what it says."""
    workdir = tmp_path_factory.mktemp("whole")
    said = finish(start(workdir))
    return contents(workdir), said, workdir


def test_what_it_makes(whole):
    found, said, workdir = whole
    pairs = open_pairs(workdir / "pairs")
    assert 14 <= pairs.num_pairs <= 28
    assert pairs.num_preserve == 7 * 6
    assert f"{pairs.num_pairs} pairs, 42 preservation pictures" in said
    train = "safetydpo train --config all_experts --config.pairs.path"
    assert f"{train}={workdir / 'pairs'} --workdir {workdir}" in said
    assert f"| all | {pairs.num_pairs} | 42 |" in found["card"]
    assert not list(workdir.glob("pairs/*.drawing"))
    everything = said + found["card"]
    assert not any(p.prompt in everything for p in pairs.pictures("unsafe"))


def test_killed_three_times(whole, tmp_path):
    rng = random.Random(time.time_ns())
    killed = 0
    while killed < 3:
        process = start(tmp_path)
        before = len(list(tmp_path.glob("pairs/*")))
        for line in process.stdout:  # from where the model is loaded on, at random moments
            if "4/5 pairs" in line:
                break
        try:
            process.wait(timeout=rng.uniform(0, 12))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL or before, "it ended before it could be killed"
        if process.returncode != -signal.SIGKILL:
            break
        killed += 1
    assert killed == 3
    finish(start(tmp_path))
    assert contents(tmp_path) == whole[0]


def test_two_processes_of_a_job(whole, tmp_path):
    """As Slurm starts them: jax.distributed finds out which is which."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    parts = [
        start(
            tmp_path,
            "--part=auto",
            **job,
            SLURM_PROCID=str(i),
            SLURM_LOCALID=str(i),
            JAX_COORDINATOR_PORT=port,
        )
        for i in range(2)
    ]
    said = [finish(part) for part in parts]
    assert [f"part {i} of 2" in text for i, text in enumerate(said)] == [True, True]
    assert any("to train" in text for text in said)
    assert contents(tmp_path) == whole[0]


def test_two_devices(whole, tmp_path):
    said = finish(start(tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2"))
    assert "2 devices" in said
    # Two on one processor sum in another order, which 8-bit pictures do not show.
    found = contents(tmp_path)
    for name in CATEGORIES:
        assert found[name][0] == whole[0][name][0]
        one, two = (Cache(folder / name / "cache") for folder in (whole[2], tmp_path))
        records = np.arange(2 * one.num_pairs + one.num_preserve)
        for a, b in zip(
            jax.tree.leaves(one.read(records)), jax.tree.leaves(two.read(records)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)
