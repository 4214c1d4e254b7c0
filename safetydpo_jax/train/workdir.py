"""What surrounds a run: its folder's lock, its part, signals, and the phases with their times."""

import contextlib
import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from safetydpo_jax import processes, storage
from safetydpo_jax.errors import UserError

_WHICH = """
import jax
from safetydpo_jax import processes
processes.connect()
visible = [jax.config.values[f"jax_{kind}_visible_devices"] for kind in ("cuda", "rocm")]
print(jax.process_index(), jax.process_count(), *visible)
"""


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path, part: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Makes the folder and holds it for this process; the kernel frees it when the process ends.

    Args:
      workdir: the folder.
      part: (i, n), of a job whose n parts share the folder.

    Raises:
      UserError: another run holds it, or it cannot be made.
    """
    name = ".lock" if part == (0, 1) else f".lock.{part[0]}of{part[1]}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / name, "a+")  # noqa: SIM115 (closed below, with the lock)
    except OSError as error:
        raise UserError(f"{workdir} cannot be used: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by another run (process {file.read().strip()}): wait for it, "
                "stop it, or choose another folder"
            ) from None
        except OSError as error:
            raise storage.no_locks(workdir, error) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def part_of(text: str) -> tuple[int, int]:
    """What `--part` says: "I/N", "auto", or "", which is all.

    "auto" asks JAX which process this is of how many (TPU pods, Slurm, Open MPI, Kubernetes).

    Raises:
      UserError: it is none of these, or JAX does not know.
    """
    if not text:
        return 0, 1
    if text == "auto":
        # In a process of its own: what is computed later, in parts that end when they are done,
        # would otherwise wait for the others or fail when they are gone.
        asked = subprocess.run(
            [sys.executable, "-c", _WHICH], capture_output=True, text=True, check=False
        )
        if asked.returncode == processes.LOST:
            sys.stderr.write(asked.stderr)
            raise SystemExit(asked.returncode)
        if asked.returncode:
            reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
            reason = reason.rpartition("UserError: ")[2].removeprefix("--distributed: ")
            raise UserError(
                f"--part auto: JAX does not know which process of a job this is ({reason}): give "
                "--part I/N"
            )
        index, count, *visible = asked.stdout.split()[-4:]
        for kind, ids in zip(("cuda", "rocm"), visible, strict=True):
            jax.config.update(f"jax_{kind}_visible_devices", ids)  # of a process for each GPU
        return int(index), int(count)
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)):
        raise UserError(f"--part is {text!r}: write it as 0/4, the first of four, or auto")
    if int(match[1]) >= int(match[2]):
        raise UserError(f"--part is {text!r}: parts are numbered from 0, so the last is one less")
    return int(match[1]), int(match[2])


class Stop:
    """Which signal asked the run to stop, if any."""

    asked: signal.Signals | None = None


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Within, SIGTERM and Ctrl-C only leave a note, so that a step can end and be saved.

    Outside of a program's main thread, where Python hears no signals, there will be none.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        stop.asked = signal.Signals(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Phases:
    """Announces the phases of a run and remembers how long each took."""

    def __init__(self, progress: Callable[[str], None], total: int):
        self.progress = progress
        self._total = total
        self._seconds: dict[str, float] = {}  # in the order of phases, whose names differ
        self._name, self._began = "", time.monotonic()

    def begin(self, name: str) -> None:
        """Ends the phase before and starts this one."""
        self.end()
        self._name = name
        self.progress(
            f"\n=== {len(self._seconds) + 1}/{self._total} {name} " + "=" * (60 - len(name))
        )

    def end(self) -> None:
        """Ends the phase that is running, if one is."""
        now = time.monotonic()
        if self._name:
            self._seconds[self._name] = now - self._began
        self._name, self._began = "", now

    def table(self) -> str:
        """The seconds of every phase and their sum."""
        rows = [*self._seconds.items(), ("total", sum(self._seconds.values()))]
        return "\n".join(f"{name:<20}{seconds:8.1f} s" for name, seconds in rows)
