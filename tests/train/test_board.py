"""TensorBoard's files, read back as TensorBoard does."""

import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from safetydpo_jax.errors import UserError
from safetydpo_jax.train.board import Board


def events(file):
    """The records of one: a length, its checksum, the bytes, their checksum."""
    data = file.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def points(folder):
    """(step, name, value) of all starts; of each step what the last start wrote."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in events(file):
            if event.session_log.status == SessionLog.START:
                found = [point for point in found if point[0] < event.step]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_a_start_goes_on_where_a_killed_one_was(tmp_path):
    killed = Board(tmp_path / "board", 1)
    for step in (1, 2, 3):
        killed.scalar("loss", step / 2, step)
        killed.flush()
    with Board(tmp_path / "board", 3) as board:  # from the checkpoint of step 2
        board.scalar("loss", 7.0, 3)
        board.picture("samples", np.zeros((4, 6, 3), np.uint8), 3)
    found = points(tmp_path / "board")
    assert [point for point in found if point[1] == "loss"] == [
        (1, "loss", 0.5),
        (2, "loss", 1.0),
        (3, "loss", 7.0),
    ]
    assert (3, "samples") in {point[:2] for point in found}
    killed.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    with Path("/dev/full").open("wb", 0) as full:
        monkeypatch.setattr(record_writer, "open_file", lambda path: full)
        with pytest.raises(UserError, match="could not write .*board .*: free some space"):
            Board(tmp_path / "board", 1)
