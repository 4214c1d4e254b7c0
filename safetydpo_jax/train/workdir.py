"""What surrounds a run: its folder's lock, signals, and the phases with their times."""

import contextlib
import fcntl
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

from safetydpo_jax.errors import UserError


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; the kernel frees it when the process ends.

    Raises:
      UserError: another run holds it, or it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+")  # noqa: SIM115 (closed below, with the lock)
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
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Stop:
    """Which signal asked the run to stop, if any."""

    asked: signal.Signals | None = None


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Within, SIGTERM and Ctrl-C only leave a note, so that a step can end and be saved."""
    stop = Stop()

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
