"""TensorBoard's event files, written by whoever calls."""

import pathlib
import time
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)

from safetydpo_jax import storage


class Board:
    """Curves and pictures of a run, in a file of their own for every start.

    tensorboardX's `SummaryWriter` hands them to a thread, which a full disk ends: then the run
    would wait for it for ever.

    Args:
      folder: where they go; it is made.
      first_step: that this start may write; points of it and later, of starts before, are dropped.

    Raises:
      UserError: of this and of all its methods, there is no room on the disk.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._folder = folder
        with storage.explained_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # With a name of its own also if the last start was within this second.
            self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the file."""
        with storage.explained_writes(self._folder):
            self._writer.close()

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._add(step, summary=summary.scalar(name, value))

    def picture(self, name: str, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """A picture of a step."""
        self._add(step, summary=summary.image(name, pixels, dataformats="HWC"))

    def flush(self) -> None:
        """Has what was written on the disk, should this process be killed."""
        with storage.explained_writes(self._folder):
            self._writer.flush()

    def _add(self, step: int, **content: Any) -> None:
        with storage.explained_writes(self._folder):
            self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
