"""Safetensors files: opened with errors that help, and written tensor by tensor.

Source of the format: https://huggingface.co/docs/safetensors, "Format".
"""

import collections
import contextlib
import json
import math
import pathlib
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from safetydpo_jax import storage
from safetydpo_jax.errors import MissingFileError, UserError

_TYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


class TensorFile:
    """An open safetensors file; what cannot be read raises UserError.

    Attributes:
      path: the file.
    """

    def __init__(self, path: pathlib.Path, file: Any):
        self.path, self._file = path, file

    def keys(self) -> list[str]:
        """The tensors' names."""
        return list(self._file.keys())

    def metadata(self) -> dict[str, str]:
        """The header's entries."""
        return dict(self._file.metadata() or {})

    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        """All tensors of a file whose names are KIND.NAME, by both; none of a kind is none."""
        found: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
        for key in self.keys():
            kind, _, name = key.partition(".")
            found[kind][name] = self.read(key)
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, which is not read."""
        return tuple(self._file.get_slice(key).get_shape())

    def can_change(self, key: str) -> bool:
        """Whether a tensor, which is not read, is of a type that is written here."""
        return self._file.get_slice(key).get_dtype() in _TYPES.values()

    def read(self, key: str) -> np.ndarray:
        """A tensor; UserError if it is of a type that NumPy has not, or not there."""
        with _explained_reading(self.path):
            return self._file.get_tensor(key)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[TensorFile]:
    """A file of safetensors, to be read tensor by tensor.

    Raises:
      MissingFileError: there is no such file.
      UserError: it is a pickle, or not a whole safetensors file.
    """
    if path.suffix in PICKLES:
        raise UserError(
            f"{path}: pickle files can run code and are not read; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'x.safetensors')"
        )
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; give the path of a .safetensors file")
    with contextlib.ExitStack() as stack:
        with _explained_reading(path):
            file = stack.enter_context(safe_open(str(path), framework="numpy"))
        yield TensorFile(path, file)


def check_file(path: pathlib.Path) -> None:
    """Raises as `opened`; reads no tensor. For before work that wants the file later."""
    with opened(path):
        pass


@contextlib.contextmanager
def _explained_reading(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, TypeError) as error:  # such as 8 bits
        raise UserError(
            f"{path}: holds numbers of a type that is not read here ({error}); save it as float16 "
            "or float32"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); it may be cut short: fetch or "
            "export it again"
        ) from error


def write_tensors(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: Any = np.float32,
    metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes a file whose name appears once it is whole, holding one tensor at a time.

    Equal content gives equal bytes; the library's own writer shuffles the header at every run.

    Args:
      path: the file; its folder is made.
      shapes: of all tensors, by name.
      tensors: names and values, in any order.
      dtype: the type to write them in: float32, float16 or bfloat16.
      metadata: the header's entries.

    Raises:
      UserError: a value is not finite in `dtype`, or the disk is full or read-only.
    """
    kind, offset = np.dtype(dtype), 0
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))}
    for name, shape in sorted(shapes.items()):
        span = [offset, offset + math.prod(shape) * kind.itemsize]
        header[name] = {"dtype": _TYPES[kind], "shape": list(shape), "data_offsets": span}
        offset = span[1]
    with storage.explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.new_file(path) as file:
            _write_header(file, header)
            _write_into(file, file.tell(), header, tensors, path, "a wider type may hold it")
    return path


def write_changed(
    path: pathlib.Path,
    source: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str],
    remedy: str,
) -> pathlib.Path:
    """Writes a copy of a file with other values in some tensors, one in memory at a time.

    Each keeps its type and its place; of the others, of whatever type, not a byte is touched.

    Args:
      path: the file, whose name appears once it is whole; its folder is made.
      source: what is copied.
      tensors: names and new values, in any order; of types that `TensorFile.can_change`.
      metadata: the header's entries.
      remedy: what to do about a value that is too large for its type.

    Raises:
      UserError: a value is not finite in its tensor's type, or the disk is full or read-only.
    """
    with source.open("rb") as old, storage.explained_writes(path):
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length)) | {"__metadata__": dict(sorted(metadata.items()))}
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.new_file(path) as file:
            _write_header(file, header)
            start = file.tell()
            shutil.copyfileobj(old, file, 2**24)
            _write_into(file, start, header, tensors, path, remedy)
    return path


def _write_header(file: BinaryIO, header: Mapping[str, Any]) -> None:
    """Leaves the file where its tensors begin."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _write_into(
    file: BinaryIO,
    start: int,
    header: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    path: pathlib.Path,
    remedy: str,
) -> None:
    """Writes tensors in the types and to the places, from `start`, that a header says."""
    types = {name: kind for kind, name in _TYPES.items()}
    for name, value in tensors:
        kind = types[header[name]["dtype"]]
        with np.errstate(over="ignore"):
            tensor = np.ascontiguousarray(value, kind)
        if not np.isfinite(tensor).all():
            raise UserError(
                f"{path}: not written: '{name}' holds NaN or infinity as {kind.name}; {remedy}"
            )
        file.seek(start + header[name]["data_offsets"][0])
        file.write(tensor.tobytes())
