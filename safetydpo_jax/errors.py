"""Errors that are the user's to mend, and how a launch script shows them."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeGuard

GPU_MEMORY_SHARE = 0.92  # that a run takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(ValueError):
    """A wrong input: one clear sentence that says what was wrong, where, and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named, or that a named folder should hold, is not there."""


class UnreachableError(UserError):
    """A bucket or the hub did not answer: the same command may go on later."""


@contextlib.contextmanager
def adding(words: str) -> Iterator[None]:
    """Within it, ends what a UserError says with these words."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}{words}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str | None:
    """The one line for an error that is the user's to mend; None if it is a bug."""
    if isinstance(error, (UserError, FileNotFoundError)):
        return str(error)
    if isinstance(error, PermissionError) and error.filename:
        return (
            f"{error.filename}: {error.strerror}: choose another place, or let this user read and "
            "write it"
        )
    if is_out_of_memory(error):
        return (
            f"{first_line(error)[:300]}: the device's memory is full. Take less at a time: "
            "--batch_size, or config.batch_size with as much more of config.accumulation, which is "
            "the same update of a new run (config.drawing.batch_size for pictures); or half as "
            "large numbers, --dtype or --config.dtype bfloat16; or --config.remat=true"
        )
    if no_place(error):
        what = error.filename or "to the disk"
        return (
            f"could not write {what} ({error.strerror}): free some space or choose another place, "
            "and start the command again"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room for a program, or for what it was given."""
    said = str(error)
    return type(error).__name__ == "JaxRuntimeError" and (
        "RESOURCE_EXHAUSTED" in said and ("memory" in said or "allocat" in said)
    )


def no_place(error: BaseException) -> TypeGuard[OSError]:
    """Whether a disk is full, or is not to be written to."""
    return isinstance(error, OSError) and error.errno in _NO_PLACE


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a launch script and exits: 0 or `main`'s code, 2 on a user's error, 130 on Ctrl-C.

    A wrong input (`UserError`), a missing file, one that may not be read or written, a full disk or
    a device's full memory is told in one line, without a traceback. Every other exception is a bug
    and keeps it.

    Args:
        main: the script; reads its own command line, returns an exit code or None.
    """
    # transformers only tokenizes here: its advice to install PyTorch would mislead.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # By itself JAX leaves a quarter of a GPU's memory to others.
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # its other name, which goes with no other
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    try:
        sys.exit(main())
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
