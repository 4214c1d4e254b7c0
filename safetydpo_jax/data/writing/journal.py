"""What has been answered: a line a request, written when the answer is there and never again.

A killed run finds here what it need not ask again, so that nothing is lost and nothing doubled.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError


class Journal:
    """The answers by request, in a file of JSON lines; the first line says what they depend on.

    Args:
      path: the file; made if needed.
      settings: what the answers depend on, fit for JSON.

    Attributes:
      answers: by the request's id: "pairs", a list of [unsafe, safe], and "faults".

    Raises:
      UserError: the file is of other settings, or no such journal.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.answers: dict[str, dict[str, Any]] = {}
        settings = json.loads(json.dumps(settings))
        kept = [{"settings": settings}]
        if path.is_file():
            kept = _lines(path)
            remedy = "or choose another folder to write to"
            storage.check_same(path, kept[0].get("settings", {}), settings, remedy)
            self.answers = {line["id"]: line for line in kept[1:]}
        # Written anew, so that what a kill tore off is not in the middle.
        text = "".join(json.dumps(line) + "\n" for line in kept)
        with storage.explained_writes(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_file(path, text.encode())
            self._file = path.open("ab", buffering=0)  # a line is there or it is not
        self._path = path

    def add(self, name: str, pairs: list[Any], faults: list[str]) -> None:
        """Keeps the answer to a request."""
        line = {"id": name, "pairs": pairs, "faults": faults}
        with storage.explained_writes(self._path):
            self._file.write(json.dumps(line).encode() + b"\n")
            os.fsync(self._file.fileno())
        self.answers[name] = line

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        lines = [json.loads(line) for line in whole]
    except ValueError:
        lines = []
    keys = [{"settings"}, *[{"id", "pairs", "faults"}] * (len(lines) - 1)]
    if not lines or not all(
        isinstance(line, dict) and needed <= line.keys()
        for line, needed in zip(lines, keys, strict=True)
    ):
        raise UserError(f"{path} is no journal of prompts: choose another folder to write to")
    return lines
