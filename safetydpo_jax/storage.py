"""Folders that are either whole or absent, and the hashes that say what they were made from."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetydpo_jax.errors import MissingFileError, UserError, first_line

CARD = "card.json"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, as 64 hex digits; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_parts(sources: Mapping[str, Sequence[Path]], parts: Sequence[str] | None = None) -> str:
    """SHA-256 over what a model was read from, wherever it lies.

    Args:
      sources: the files that each part of the model was read from, as `Pipeline.sources`.
      parts: which parts, those that the model has not being left out; None is all of them.
    """
    chosen = sources if parts is None else {x: sources[x] for x in parts if x in sources}
    return digest({part: sorted(map(_hash_again, files)) for part, files in chosen.items()})


def _hash_again(path: Path) -> str:
    stat = path.stat()
    return _hash_of(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hash_of(path: Path, size: int, changed: int) -> str:
    """A checkpoint in a single file has gigabytes, and is a source of every part."""
    return hash_file(path)


def check_same(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], otherwise: str
) -> None:
    """Compares the settings that made a folder with those of now, both as JSON has them.

    Args:
      folder: what was made.
      before: its settings, by key.
      now: those of the run that wants to use it.
      otherwise: what the user can do besides setting the key back; ends the error's sentence.

    Raises:
      UserError: they differ; it names the first key that does.
    """
    for key in sorted(before.keys() | now.keys()):
        if (old := before.get(key)) != (new := now.get(key)):
            raise UserError(
                f"{folder} was made with {key} = {old!r}, but now it is {new!r}: set it back, "
                f"{otherwise}"
            )


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `path` at the end, replacing an old one.

    A process killed inside leaves no `path` that is only half there.

    Raises:
      UserError: the disk is full, or does not let us write.
    """
    partial = path.with_name(path.name + ".writing")
    old = path.with_name(f"{path.name}.{secrets.token_hex(4)}.old")
    with explained_writes(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if path.is_dir():  # at once out of the way: removed file by file it would be half there
                path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not path.exists():
                old.rename(path)


_BUGS = (NotImplementedError, RecursionError)  # RuntimeErrors that no disk is to blame for


@contextlib.contextmanager
def explained_writes(path: Path) -> Iterator[None]:
    """Turns a failed write, Python's or ArrayRecord's (a RuntimeError), into a `UserError`.

    What is written may be computed meanwhile: JAX's errors are others.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        import jax  # here: it takes seconds, and --help asks for a module that writes files

        if isinstance(error, (UserError, jax.errors.JaxRuntimeError, *_BUGS)):
            raise
        reason = first_line(error)
        raise UserError(
            f"could not write {path} ({reason}): free some space or choose another place"
        ) from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write into, which becomes `path` at the end.

    A process killed inside leaves `path` as it was, and beside it a file that ends in ".writing".
    """
    partial = unfinished(path)
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Where a file is written that is to become this one; another name at each call."""
    # Another may write it too, in a container where it has the same number.
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")


def check_writable(path: Path) -> None:
    """Finds out whether a file can be written, before the work that it is to hold.

    Raises:
      UserError: the disk is full or does not let us write, or there is a folder of this name.
    """
    with explained_writes(path):
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        partial = unfinished(path)
        try:
            partial.write_bytes(b"0")  # of a full disk a file's name alone might find a place
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a file that stands for what several processes may write; the kernel frees it.

    Args:
      path: the file; it is made, with its folder, and stays.
      waiting: called before it waits for another process.

    Raises:
      UserError: it cannot be made.
    """
    with explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise no_locks(path, error) from None
        yield


def no_locks(path: Path, error: OSError) -> UserError:
    """What to raise where `flock` is refused, as by some network disks."""
    return UserError(
        f"{path} is on a disk that cannot lock files ({error.strerror}): choose another, or mount "
        "it with locks (Lustre: -o flock)"
    )


def write_file(path: Path, data: bytes) -> None:
    """Writes a file that is whole or absent, whenever the process is killed."""
    with new_file(path) as file:
        file.write(data)


def write_card(folder: Path, card: dict[str, Any], names: Sequence[str] | None = None) -> None:
    """Writes `card` to `folder`/card.json, with the size and hash of the files beside it.

    Args:
      folder: where.
      card: what else it should say.
      names: the files; by default all that are there.
    """
    chosen = folder.rglob("*") if names is None else (folder / name for name in names)
    files = {
        f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": hash_file(f)}
        for f in sorted(chosen)
        if f.is_file()
    }
    text = json.dumps(card | {"files": files}, indent=2, sort_keys=True)
    write_file(folder / CARD, text.encode() + b"\n")


def parse_card(folder: Any, remedy: str) -> dict[str, Any]:
    """`folder`/card.json, the files beside it left alone.

    Args:
      folder: a `Path`, or what acts as one.
      remedy: what the user should do if it is damaged; ends the error's sentence.

    Raises:
      MissingFileError: there is no card.
      UserError: it is not one of ours.
    """
    path = folder / CARD
    if not path.is_file():
        if not folder.is_dir():
            raise MissingFileError(
                f"there is no folder {folder}: give the one meant, or make its content first"
            )
        raise MissingFileError(f"{folder} has no {CARD}: {remedy}")
    try:
        card = json.loads(path.read_bytes())
        listed_files(card)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a card of this program ({error!r}): {remedy}") from error
    return card


def listed_files(card: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The files of a card: size and SHA-256 by name."""
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in card["files"].items()}


def read_card(folder: Path, remedy: str, *, hashes: bool = False) -> dict[str, Any]:
    """Reads `folder`/card.json and compares the files beside it with it.

    Args:
      folder: a pair set or a cache.
      remedy: what the user should do if it is damaged; ends the error's sentence.
      hashes: read every file and compare its hash too, not only its size.

    Raises:
      MissingFileError: no card, or a file it lists is not there.
      UserError: the card is not one of ours, or a file is not the one it lists.
    """
    card = parse_card(folder, remedy)
    for name, (size, sha256) in listed_files(card).items():
        file = folder / name
        if not file.is_file():
            raise MissingFileError(f"{file}, listed in {CARD}, is not there: {remedy}")
        if file.stat().st_size != size or (hashes and hash_file(file) != sha256):
            raise UserError(f"{file} is damaged: it is not the file that {CARD} lists; {remedy}")
    return card
