"""Errors that are the user's to mend, and how a launch script shows them."""

import errno
import os
import sys
from collections.abc import Callable

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(ValueError):
    """A wrong input: one clear sentence that says what was wrong, where, and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named, or that a named folder should hold, is not there."""


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a launch script and exits: 0 or `main`'s code, 2 on a user's error, 130 on Ctrl-C.

    A wrong input (`UserError`), a missing file or a full disk is told in one line, without a
    traceback. Every other exception is a bug and keeps its traceback.

    Args:
        main: the script; reads its own command line, returns an exit code or None.
    """
    # transformers only tokenizes here: its advice to install PyTorch would mislead.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        sys.exit(main())
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        what = error.filename or "to the disk"
        print(
            f"error: could not write {what} ({error.strerror}): free some space, and start the "
            "same command again",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
