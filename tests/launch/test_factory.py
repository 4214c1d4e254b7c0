"""The factory from concepts to caches on the embedded world: killed, in parts, over devices."""

import random
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from benchmarks import factory
from safetydpo_jax.data import Cache, open_pairs
from safetydpo_jax.harm import CATEGORIES

# Few and quickly drawn, so that the judge drops many.
OPTIONS = [
    "--config.pairs.num_pairs=28",
    "--config.pairs.preserve_count=6",
    "--config.drawing.batch_size=8",
    "--config.drawing.num_steps=4",
]

pytestmark = pytest.mark.slow


def start(workdir, **environment):
    return factory.start(workdir, OPTIONS, subprocess.PIPE, **environment)


def finish(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def contents(workdir):
    return factory.contents(workdir) | {"card": (workdir / "pairs" / "README.md").read_text()}


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
    assert f"{pairs.num_pairs} of 28 pairs, 42 preservation pictures" in said
    train = "safetydpo train --config all_experts --config.pairs.path"
    assert f"{train}={workdir / 'pairs'} --workdir {workdir}" in said
    assert f"| all | {pairs.num_pairs} | 28 | 42 |" in found["card"]
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
    parts = factory.start_job(tmp_path, OPTIONS, (subprocess.PIPE, subprocess.PIPE))
    said = [finish(part) for part in parts]
    assert [f"part {i} of 2" in text for i, text in enumerate(said)] == [True, True]
    assert any("to train" in text for text in said)
    assert contents(tmp_path) == whole[0]


def test_two_devices(whole, tmp_path):
    said = finish(start(tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2"))
    assert "2 x cpu" in said
    # Two on one processor sum in another order, which 8-bit pictures do not show.
    found = contents(tmp_path)
    for name in CATEGORIES:
        assert found[name][:2] == whole[0][name][:2]
        one, two = (Cache(folder / name / "cache") for folder in (whole[2], tmp_path))
        records = np.arange(2 * one.num_pairs + one.num_preserve)
        for a, b in zip(
            jax.tree.leaves(one.read(records)), jax.tree.leaves(two.read(records)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)
