"""Checkpoints in a bucket, fetched to this host's disk as those on the hub are.

They lie in `remote.cache_home()`, and are fetched again where the bucket's file has another size or
another date than the one that was fetched.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from safetydpo_jax import storage
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models.hub import INDEX, files_to_fetch, network_files
from safetydpo_jax.models.pipeline import TOKENIZERS
from safetydpo_jax.remote import cache_home, download, explained, told

_FETCHED = ".fetched.json"  # each file's size and date, as they were in the bucket
_FOLDERS = {"unet", "vae", *TOKENIZERS, *TOKENIZERS.values(), "scheduler"}


def fetch_checkpoint(
    address: str,
    check: Callable[[Path], Any] = lambda index: None,
    index_name: str = INDEX,
) -> Path:
    """The copy on this host of a checkpoint in a bucket; fetches what of it is not there yet.

    Args:
      address: of a folder in the diffusers layout, like gs://bucket/folder, or of a .safetensors
        file.
      check: called with a folder's index before anything large is fetched.
      index_name: model_index.json for a whole checkpoint, config.json for a single network.

    Raises:
      MissingFileError: there is nothing, or no index.
      UserError: it cannot be reached and was never fetched, holds no safetensors, or the disk is
        full.
    """
    with explained(address):
        there = epath.Path(address.rstrip("/"))
    copy = cache_home() / "models" / hashlib.sha256(str(there).encode()).hexdigest()[:16]
    is_file = there.suffix == ".safetensors"
    folder, first = (there.parent, there.name) if is_file else (there, index_name)
    place = copy / there.name if is_file else copy
    waiting = lambda: print(f"{there}: another process fetches it", flush=True)  # noqa: E731
    with storage.held(copy.with_suffix(".lock"), waiting):
        before = _fetched(copy)
        try:
            names = [first] if is_file else _names(folder, index_name)
            files = {name: _size_and_date(folder / name) for name in names}
        except MissingFileError:
            raise
        except UserError as error:
            if first not in before:
                raise
            warnings.warn(f"{error}; using what was fetched before", stacklevel=2)
            return place
        if not is_file:
            _fetch(folder, copy, {first: files[first]}, before)
            check(copy / first)
        _fetch(folder, copy, files, before)
    return place


def _names(there: Any, index_name: str) -> list[str]:
    """Which of a folder's files make up the checkpoint, or the single network."""
    with explained(there):
        found = [file.name for file in there.iterdir()] if there.exists() else []
    if index_name not in found:
        raise MissingFileError(
            f"{there}: there is no {index_name}: give the address of a checkpoint in the diffusers "
            "layout, or of a .safetensors file"
        )
    if index_name != INDEX:
        return [index_name, *network_files(found, str(there))]
    with explained(there):
        for folder in set(found) & _FOLDERS:
            found += [f"{folder}/{file.name}" for file in (there / folder).iterdir()]
    return files_to_fetch(found, str(there))


def _size_and_date(file: Any) -> list[int]:
    with explained(file):
        stat = file.stat()
    return [stat.length, stat.mtime]


def _fetch(there: Any, copy: Path, files: dict[str, list[int]], before: dict[str, Any]) -> None:
    """Brings the files that are not here as the bucket has them, and keeps `before` in step."""
    missing = {
        name: of_bucket[0]
        for name, of_bucket in files.items()
        if before.get(name) != of_bucket or not (copy / name).is_file()
    }
    for name, copied in told(missing, f"{there}: fetching", lambda line: print(line, flush=True)):
        before.pop(name, None)
        _remember(copy, before)
        download(there / name, copy / name, copied)
        if (size := (copy / name).stat().st_size) != missing[name]:
            raise UserError(
                f"{there / name}: {size} bytes arrived of {missing[name]}; the same command goes "
                "on with what is missing"
            )
        before[name] = files[name]
        _remember(copy, before)


def _fetched(copy: Path) -> dict[str, Any]:
    file = copy / _FETCHED
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _remember(copy: Path, files: dict[str, Any]) -> None:
    with storage.explained_writes(copy):
        copy.mkdir(parents=True, exist_ok=True)
        storage.write_file(copy / _FETCHED, json.dumps(files).encode())
