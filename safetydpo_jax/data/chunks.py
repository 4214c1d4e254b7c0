"""Pictures on their way to a pair set: a batch a file, each whole or absent."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import UInt8

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError

_PICTURES, _VERDICTS, _SUFFIX = "pictures", "verdicts", ".safetensors"


class Chunks:
    """Batches of drawn pictures by name, each with what the judge said of its pairs.

    Args:
      folder: for the files; made if needed. Several processes may share it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._verdicts: dict[str, list[str]] = {}
        self._last: tuple[str, np.ndarray] | None = None
        with storage.explained_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> set[str]:
        """Those that are there by now."""
        return {file.stem for file in self.folder.iterdir() if file.suffix == _SUFFIX}

    def write(self, name: str, pictures: UInt8[np.ndarray, "n H W 3"], verdicts: list[str]) -> None:
        """Stores a chunk."""
        file = self._file(name)
        said = {_VERDICTS: json.dumps(verdicts)}
        with storage.explained_writes(file):
            storage.write_file(file, safetensors.numpy.save({_PICTURES: pictures}, said))
        self._verdicts[name] = verdicts

    def verdicts(self, name: str) -> list[str]:
        """Of a chunk that is there."""
        if name not in self._verdicts:
            with self._opened(name) as chunk:
                self._verdicts[name] = json.loads(chunk.metadata()[_VERDICTS])
        return self._verdicts[name]

    def pictures(self, name: str) -> UInt8[np.ndarray, "n H W 3"]:
        """Of a chunk that is there; the last one is held, as they are read in order."""
        if self._last is None or self._last[0] != name:
            with self._opened(name) as chunk:
                self._last = name, chunk.get_tensor(_PICTURES)
        return self._last[1]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        file = self._file(name)
        try:
            with safetensors.safe_open(file, "np") as chunk:
                yield chunk
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}): remove it to draw it again") from error

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"
