"""Checkpoints in a bucket, fetched to this host's disk as those on the hub are.

They lie in `remote.cache_home()`, and are fetched again where the bucket's file has another size or
another date than the one that was fetched. (etils reads no dates of s3://: there the size decides.)
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from safetydpo_jax import storage
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models.hub import INDEX, SMALL, files_to_fetch, network_files
from safetydpo_jax.models.pipeline import TOKENIZERS
from safetydpo_jax.remote import cache_home, copied_files, download, explained, say

_FETCHED = ".fetched.json"  # each file's size and date in the bucket, and whether it is all
_FOLDERS = {"unet", "vae", *TOKENIZERS, *TOKENIZERS.values(), "scheduler"}


def fetch_checkpoint(
    address: str,
    check: Callable[[Path], Any] = lambda index: None,
    index_name: str = INDEX,
    check_configs: Callable[[Path], Any] = lambda folder: None,
) -> Path:
    """The copy on this host of a checkpoint in a bucket; fetches what of it is not there yet.

    Args:
      address: of a folder in the diffusers layout, like gs://bucket/folder, or of a .safetensors
        file.
      check: called with a folder's index before anything else is fetched.
      index_name: model_index.json for a whole checkpoint, config.json for a single network.
      check_configs: called with a checkpoint's folder before its weights are fetched.

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
    waiting = functools.partial(say, f"{there}: another process fetches it")
    with storage.held(copy.with_suffix(".lock"), waiting):
        here, whole = _fetched(copy)
        try:
            names = [first] if is_file else _names(folder, index_name)
            files = {name: _size_and_date(folder / name) for name in names}
        except MissingFileError:
            raise
        except UserError as error:
            if not whole:
                raise
            warnings.warn(f"{error}; using what was fetched before", stacklevel=2)
            return place
        kept = {name: here[name] for name in here if here[name] == files.get(name)}
        _remove_others(copy, kept)
        if not whole or kept != files:
            _remember(copy, kept, whole=False)  # of two versions no part may meet the other
        if not is_file:
            _fetch(folder, copy, {first: files[first]}, kept)
            check(copy / first)
            if index_name == INDEX:
                small = {name: of for name, of in files.items() if SMALL.fullmatch(name)}
                _fetch(folder, copy, small, kept)
                check_configs(copy)
        _fetch(folder, copy, files, kept)
        _remember(copy, kept, whole=True)
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


def _fetch(there: Any, copy: Path, files: dict[str, list[int]], kept: dict[str, Any]) -> None:
    """Brings the files that are not here, and adds them to `kept`."""
    missing = {name: size for name, (size, _) in files.items() if name not in kept}

    def fetch(name: str, copied: Callable[[int], None]) -> None:
        download(there / name, copy / name, copied)

    for name, _ in copied_files(missing, fetch, f"{there}: fetching", say):
        if (size := (copy / name).stat().st_size) != missing[name]:
            raise UserError(
                f"{there / name}: {size} bytes arrived of {missing[name]}; the same command goes "
                "on with what is missing"
            )
        kept[name] = files[name]
        _remember(copy, kept, whole=False)


def _remove_others(copy: Path, kept: dict[str, Any]) -> None:
    """Removes what the bucket has no more, which a reader might prefer, and what is not whole."""
    with storage.explained_writes(copy):
        for file in copy.rglob("*"):
            name = file.relative_to(copy).as_posix()
            if file.is_file() and name not in kept and name != _FETCHED:
                file.unlink()


def _fetched(copy: Path) -> tuple[dict[str, Any], bool]:
    """Which files are here, and whether they are all."""
    if not (file := copy / _FETCHED).is_file():
        return {}, False
    found = json.loads(file.read_bytes())
    here = {name: of for name, of in found["files"].items() if (copy / name).is_file()}
    return here, found["whole"] and here == found["files"]


def _remember(copy: Path, files: dict[str, Any], *, whole: bool) -> None:
    with storage.explained_writes(copy):
        copy.mkdir(parents=True, exist_ok=True)
        record = {"files": files, "whole": whole}
        storage.write_file(copy / _FETCHED, json.dumps(record).encode())
