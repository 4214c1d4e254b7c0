"""A small safetensors file, read whole, and written so that equal content gives equal bytes."""

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from safetydpo_jax import storage
from safetydpo_jax.errors import MissingFileError, UserError


def read_tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the header's entries.

    Raises:
      MissingFileError: there is no such file.
      UserError: it is a pickle, not a whole safetensors file, or empty.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such LoRA file; give the path of a .safetensors file")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UserError(
            f"{path}: pickle files can run code and are not read; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'lora.safetensors')"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except (AttributeError, TypeError) as error:  # a type that NumPy has not, such as 8 bits
        raise UserError(
            f"{path}: holds numbers of a type that is not read here ({error}); save it as float16 "
            "or float32"
        ) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); copy or export it again"
        ) from None
    if not tensors:
        raise UserError(f"{path}: the file holds no tensors; export it again")
    return tensors, header


def write_tensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> pathlib.Path:
    """Writes float32 tensors; the library's own writer shuffles the header at every run.

    Raises:
      UserError: the disk is full, or does not let us write.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks, offset = [], 0
    for name, array in sorted(tensors.items()):
        data = np.ascontiguousarray(array, "<f4").tobytes()
        span = [offset, offset + len(data)]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with storage.explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_file(path, b"".join([struct.pack("<Q", len(text)), text, *chunks]))
    return path
