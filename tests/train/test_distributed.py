"""launch/train.py as a job of several processes over loopback, one of which may be killed."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest

from safetydpo_jax import processes
from safetydpo_jax.data import open_pairs
from safetydpo_jax.remote import CACHE_DIR
from safetydpo_jax.train.mirror import Workdir
from tests.data.test_remote import upload
from tests.train.conftest import write_noise
from tests.train.job import Job
from tests.train.test_kill import EXPORT, QUICK, STEPS, command, lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    """As many pairs as two shards of a cache hold, of which two processes encode one each."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_noise(folder, 0, pairs=64)
    return folder


@pytest.fixture(scope="module")
def begin(model_folder, pairs_folder):
    def begin(count, workdir, *more, env=lambda i: {}, pairs=pairs_folder, **options):
        # In bfloat16 rounding, which differs with the number of processes, would show in the loss.
        precise = "--config.matmul_precision=float32"
        arguments = [*command(model_folder, pairs, workdir), precise, *more]
        return Job(count, arguments, env=lambda i: QUICK | env(i), **options)

    return begin


@pytest.fixture
def start(begin, tmp_path):
    return lambda count, name, *more, **options: begin(count, tmp_path / name, *more, **options)


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """Of two processes that nothing befalls, the workdir."""
    workdir = tmp_path_factory.mktemp("whole")
    codes, said = begin(2, workdir).end()
    assert codes == [0, 0], said
    assert "4 x cpu in 2 processes" in said[0]
    assert "step" not in said[1]  # the first alone speaks
    return workdir


def numbers(file):
    import safetensors.numpy

    return np.concatenate([x.ravel() for x in safetensors.numpy.load_file(file).values()])


def apart(file, other):
    x, y = numbers(file), numbers(other)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def losses(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def wait_for(job, workdir, count):
    job.wait_until(lambda: lines(workdir) >= count)


def test_one_process_trains_the_same(whole, start, tmp_path):
    codes, said = start(1, "run").end()
    assert codes == [0], said
    for line, of_two in zip(losses(tmp_path / "run")[:20], losses(whole), strict=False):
        assert line == pytest.approx(of_two, rel=1e-3)
    assert apart(tmp_path / "run" / EXPORT, whole / EXPORT) < 1e-3
    assert lines(tmp_path / "run") == lines(whole) == STEPS
    # What is only the first's: no other process wrote a line or a checkpoint of its own.
    names, others = ({p.name for p in folder.iterdir()} for folder in (tmp_path / "run", whole))
    assert names ^ others <= {".job"}


def test_stopped_and_killed_and_taken_up_by_another_number_of_processes(start, whole, tmp_path):
    rng = random.Random(time.time_ns())
    victim = rng.randrange(2)
    job = start(2, "killed")
    wait_for(job, tmp_path / "killed", 2)
    job.processes[1 - victim].send_signal(signal.SIGTERM)  # to any: all stop at one step
    codes, said = job.end()
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert "stopped by SIGTERM: step" in said[0]
    job = start(2, "killed")
    before = lines(tmp_path / "killed")
    job.wait_until(lambda: "=== 6/9 compile" in job.said(0))
    # Longer than Gloo waits for all to connect, shorter than the coordinator for a heartbeat.
    job.processes[1].send_signal(signal.SIGSTOP)
    time.sleep(40)
    job.processes[1].send_signal(signal.SIGCONT)
    wait_for(job, tmp_path / "killed", rng.randint(before + 1, 18))
    job.processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, said = job.end()
    assert time.monotonic() - began < processes.HEARTBEAT_SECONDS + 120
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] in (processes.LOST, -signal.SIGABRT), said
    assert not (tmp_path / "killed" / EXPORT).exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    codes, said = start(2, "killed").end()  # the same layout: bit for bit
    assert codes == [0, 0], said
    assert "going on from step" in said[0]
    assert (tmp_path / "killed" / EXPORT).read_bytes() == (whole / EXPORT).read_bytes()
    codes, said = start(1, "other").end()
    assert codes == [0], said
    assert "going on from step" in said[0]
    assert apart(tmp_path / "other" / EXPORT, whole / EXPORT) < 1e-3


def test_machines_that_share_nothing_but_a_bucket(begin, whole, pairs_folder, bucket, tmp_path):
    """Two, one of which is killed; then two others."""
    home, pairs = f"{bucket}/run", f"{bucket}/pairs"
    upload(pairs_folder, bucket / "pairs")

    def disk(name):
        own = lambda i: {CACHE_DIR: str(tmp_path / f"{name}{i}")}  # noqa: E731
        env = lambda i: own(i) | {"JAX_COMPILATION_CACHE_DIR": ""}  # noqa: E731
        return {"env": env, "pairs": pairs}

    job = begin(2, home, **disk("first"))
    folder = Workdir(home, print).folder.name
    wait_for(job, tmp_path / "first0" / "runs" / folder, 10)
    job.processes[1].send_signal(signal.SIGKILL)
    _, said = job.end()
    # The first's own shard, and the other's, that it fetched.
    assert "2 shards, part 0 of 2: 1 of them" in said[0]
    assert "cache: fetching shards 1 files" in said[0]
    assert not (bucket / "run" / EXPORT).exists()
    codes, said = begin(2, home, **disk("second")).end()
    assert codes == [0, 0], said
    assert f"{home}: fetching" in said[0]
    assert "going on from step" in said[0]
    assert not (bucket / "run" / "cache.partial").exists()
    # What the first's process compiled all have found there.
    programs = [x.name for x in (bucket / "run" / "compiled").glob("*/*-cache")]
    assert any("jit_step" in name for name in programs), programs
    assert (bucket / "run" / EXPORT).read_bytes() == (whole / EXPORT).read_bytes()


def test_the_first_draws_while_the_others_wait(tmp_path):
    """The embedded model's pictures; the same as one process draws by itself."""
    few = {"steps": 1, "pairs.num_pairs": 6, "pairs.preserve_count": 4, "reference.draws": 0}
    few |= {"drawing.batch_size": 8}
    found = []
    for count in (2, 1):
        workdir = tmp_path / str(count)
        options = [f"--config.{key}={value}" for key, value in few.items()]
        job = Job(count, [*command("emoji", "", workdir), *options])
        if count == 1:  # its training is another test's
            job.wait_until(lambda: "=== 4/9 cache" in job.said(0))  # noqa: B023 (called here)
            job.processes[0].kill()
        codes, said = job.end()
        assert codes == ([-signal.SIGKILL] if count == 1 else [0] * count), said
        assert "pictures/s" in said[0]
        pairs = open_pairs(str(workdir / "pairs"))
        pictures = [x for split in pairs.sizes for x in pairs.pictures(split)]
        pixels = [x.pixels for x in pictures]
        # TFDS writes the fields of an example in an order that differs from process to process.
        card = {key: said for key, said in pairs.card.items() if key != "files"}
        said = [(x.id, x.prompt, x.seed) for x in pictures]
        found.append((card, said, np.stack(pixels)))
    (card, said, pixels), (card_of_one, said_of_one, pixels_of_one) = found
    assert card == card_of_one
    assert said == said_of_one
    np.testing.assert_array_equal(pixels, pixels_of_one)


def test_a_signal_before_training_ends_the_process(start):
    """As always: nothing is lost, and launchers start it again."""
    job = start(2, "early")
    job.wait_until(lambda: "=== 2/9 base model" in job.said(0))
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    codes, said = job.end()
    assert codes == [-signal.SIGTERM] * 2, said


def test_a_process_that_is_held_is_noticed(start, tmp_path):
    options = "--config.guard.hang_seconds=60", "--config.reference.draws=2"
    job = start(2, "hanging", *options)
    wait_for(job, tmp_path / "hanging", 3)
    job.processes[1].send_signal(signal.SIGSTOP)
    job.processes[0].wait(300)
    job.processes[1].kill()
    codes, said = job.end()
    # By the watch or, as a held process gives no heartbeat either, by the coordinator.
    noticed = {processes.LOST: "nothing has happened for 60 s", -signal.SIGABRT: "unhealthy"}
    assert noticed[codes[0]] in said[0]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda i: [f"--config.seed={i}"], "differ from process 0 in the config"),
        (lambda i: [f"--config.health.every={i and -1}"], "health.every is -1"),
    ],
)
def test_processes_that_differ_are_told_so(own, message, start):
    began = time.monotonic()
    codes, said = start(2, "differing", own=own).end()
    assert any(message in text for text in said), said
    assert all(codes), said
    assert time.monotonic() - began < 400  # soon, not after a day; the machine may be busy
