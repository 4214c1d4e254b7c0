"""A job of several processes, on one host or many, which all run the same program.

The first one has the run's folder: it alone writes, and tells the others what they cannot see.
Nothing here is ever waited for by a job of one process.
"""

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the coordinator's store of texts has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safetydpo_jax.errors import UnreachableError, UserError, first_line, one_line

DAY_SECONDS = 86400  # the others may wait so long for what the first one does alone
JOIN_SECONDS = 1800  # machines of a job may start so long after the first
MEET_SECONDS = 3 * 3600  # by which one may be later than another that does the same, as compiling
HEARTBEAT_SECONDS = 100  # after which a process that gives no sign of life counts as dead
GRACE_SECONDS = 2
# Exit code when another process is gone or hangs, or a bucket or the hub does not answer: it is
# EX_TEMPFAIL, to be started again.
LOST = 75


_T = TypeVar("_T")
_count = itertools.count()


def connect() -> None:
    """Joins the job that the environment describes.

    JAX finds it out on TPU pods, Slurm, Open MPI and Kubernetes. Elsewhere the variables
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    say it.

    Raises:
      UserError: it is not found.
      SystemExit: LOST, as other processes did not come.
    """
    # JAX would take SIGTERM as a notice, which nothing here reads, and the process would live on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=DAY_SECONDS,
            initialization_timeout=JOIN_SECONDS,
            **described(),
        )
    except (ValueError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        if any(word in reason for word in ("DEADLINE_EXCEEDED", "UNAVAILABLE")):
            print(
                f"error: the other processes did not come within {JOIN_SECONDS} s ({reason}): "
                "start the job again",
                file=sys.stderr,
            )
            raise SystemExit(LOST) from None
        raise UserError(
            f"--distributed: this process cannot join a job ({reason}): start it under Slurm, Open "
            "MPI, Kubernetes or on every worker of a TPU pod, or set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def described() -> dict[str, Any]:
    """What JAX does not read of the environment by itself.

    Raises:
      UserError: a variable is no number.
    """
    found = {}
    for key, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        if value := os.environ.get(name):
            if not value.isdigit():
                raise UserError(f"{name} is {value!r}: it must be a number")
            found[key] = int(value)
    return found


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def first(what: Callable[[], Any]) -> Any:
    """What the first process finds, which alone looks; JSON.

    Raises:
      UserError: as the first process did, in all.
    """
    if jax.process_count() == 1:
        return what()
    found: dict[str, Any] = {}
    if is_first():
        try:
            found = {"value": what()}
        except Exception as error:
            found = _failure(error)
    found = json.loads(told(json.dumps(found)))
    if "error" in found:
        raise _error(found)
    return found["value"]


def _failure(error: Exception) -> dict[str, Any]:
    """A user's error as JSON; others are raised."""
    if (line := one_line(error)) is None:
        raise error
    return {"error": line, "again": isinstance(error, UnreachableError)}


def _error(found: Mapping[str, Any]) -> UserError:
    """What `_failure` made JSON of."""
    return (UnreachableError if found["again"] else UserError)(found["error"])


def told(text: str, process: int = 0) -> str:
    """A process's text, in all.

    By the job's coordinator, not by the devices: these would give up waiting, or wait busily.
    """
    if jax.process_count() == 1:
        return text
    key = f"safetydpo_jax/told/{next(_count)}"  # the same in all, as they all do the same
    client: Any = distributed.global_state.client
    if jax.process_index() == process:
        client.key_value_set(key, text)
    return client.blocking_key_value_get(key, 1000 * DAY_SECONDS)


def meet() -> None:
    """Waits until all processes are here, by the coordinator.

    To be called before a group's first collective, if they do not come to it at one time, as when
    one compiles longer: Gloo, by which CPUs speak, waits 30 s for all to connect. After
    `MEET_SECONDS` the job counts as lost.
    """
    if jax.process_count() > 1:
        client: Any = distributed.global_state.client
        client.wait_at_barrier(f"safetydpo_jax/meet/{next(_count)}", 1000 * MEET_SECONDS)


def each(what: Callable[[], _T]) -> _T:
    """Does something in every process, and waits until it is done in all.

    Returns:
      This process's result.

    Raises:
      UserError: the first that any process met, in all; the others say whose it is, and on which
        host.
    """
    if jax.process_count() == 1:
        return what()
    failed: dict[str, Any] = {}
    done: Any = None
    try:
        done = what()
    except Exception as error:
        failed = _failure(error) | {"host": socket.gethostname()}
    own, count = part()
    for process in range(count):
        if found := json.loads(told(json.dumps(failed), process)):
            if process != own:
                found["error"] = f"process {process} of {count} ({found['host']}): {found['error']}"
            raise _error(found)
    return done


def part() -> tuple[int, int]:
    """(i, n): this is the i-th of n processes, from 0."""
    return jax.process_index(), jax.process_count()


def first_arrays(tree: Any) -> Any:
    """The first process's arrays, NumPy's, in all; others give any of the same shapes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def check_same(facts: Mapping[str, str]) -> None:
    """Compares what all processes have to have in common.

    Args:
      facts: by what they are called, as short texts.

    Raises:
      UserError: a process has another, in all of them; it says which and where.
    """
    if jax.process_count() == 1:
        return
    width = max(len(text.encode()) for text in facts.values())
    width = int(multihost_utils.process_allgather(np.int32(width)).max())
    mine = np.zeros((len(facts), width), np.uint8)
    for row, text in zip(mine, facts.values(), strict=True):
        row[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    every = multihost_utils.process_allgather(mine)
    for i, name in enumerate(facts):
        others = [p for p in range(len(every)) if (every[p, i] != every[0, i]).any()]
        if others:
            found = [every[p, i].tobytes().rstrip(b"\0").decode() for p in (0, others[0])]
            raise UserError(
                f"processes {', '.join(map(str, others))} of {len(every)} differ from process 0 in "
                f"{name}: {found[1]!r}, not {found[0]!r}; give all the same files and command"
            )


def any_of(number: int) -> int:
    """The largest of the processes' numbers; all must ask at the same moment."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


class Largest:
    """The largest of the processes' numbers, found by the devices of a mesh between their steps."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._count = mesh.size
        self._max = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self, number: Callable[[], int]) -> Callable[[], int]:
        """Gives this process's number; what it returns, called later, waits for the largest.

        A process alone asks for its number then.
        """
        if self._alone:
            return number
        mine = np.full(1, number(), np.int32)
        numbers = jax.make_array_from_callback((self._count,), self._split, lambda index: mine)
        largest = self._max(numbers)
        return lambda: int(largest)


@contextmanager
def job() -> Iterator[None]:
    """Joins the job, and leaves it: at the end with the others, on an error without them.

    The others would otherwise be waited for, who wait for this one.
    """
    connect()
    try:
        yield
    except SystemExit:  # which all have agreed on
        jax.distributed.shutdown()
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    except Exception as error:
        where = f"process {jax.process_index()} of {jax.process_count()}"
        line = one_line(error)
        if line is not None:
            print(f"error: {where}: {line}", file=sys.stderr)
        elif _is_loss(error):
            reason = first_line(error)[:200]
            print(
                f"error: {where}: another process is gone ({reason}); start the job again: it goes "
                "on from its last checkpoint",
                file=sys.stderr,
            )
        else:
            traceback.print_exception(error)
        sys.stderr.flush()
        sys.stdout.flush()
        if is_first():
            time.sleep(GRACE_SECONDS)  # or the others would be cut off in what they have to say
        lost = isinstance(error, UnreachableError) or _is_loss(error)
        os._exit(LOST if lost else 2 if line is not None else 1)
    else:
        jax.distributed.shutdown()


def _is_loss(error: Exception) -> bool:
    """Whether a collective failed, as it does when a process ends."""
    words = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NCCL", "coordination service")
    return not isinstance(error, UserError) and any(word in str(error) for word in words)


class Watch:
    """Ends this process when a job gives no sign of life: a device or another process hangs.

    A job of one process is not watched: whoever started it sees that.

    Args:
      seconds: how long a step, an evaluation or a checkpoint may take.
    """

    def __init__(self, seconds: float):
        self._seconds, self._last, self._done = seconds, time.monotonic(), threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()

    def alive(self) -> None:
        """A sign of life."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(min(10.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                print(
                    f"error: process {jax.process_index()} of {jax.process_count()}: nothing has "
                    f"happened for {self._seconds:.0f} s (config.guard.hang_seconds): a device or "
                    "another process hangs; start the job again: it goes on from its last "
                    "checkpoint. Where this one waits:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()
                os._exit(LOST)
