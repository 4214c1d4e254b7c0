"""What lies in a bucket: fetched once to this host's disk, and read there.

Pair sets and caches are what their card lists, fetched when the first record is asked for; who
wants the card alone, as a run with a cache does of its pairs, fetches no more.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

from etils import epath

from safetydpo_jax import storage
from safetydpo_jax.errors import MissingFileError, UnreachableError, UserError, first_line
from safetydpo_jax.pace import Pace

CACHE_DIR = "SAFETYDPO_CACHE_DIR"  # the variable that says where to
_BLOCK = 16 * 2**20
_Result = TypeVar("_Result")
_AT_ONCE = 8  # files: of small ones a bucket's answers are what takes the time
_LARGE_AT_ONCE = 2


def open_folder(folder: str | PurePath) -> Any:
    """A folder on this host, or one like gs://bucket/folder, as something that acts as a `Path`.

    Raises:
      MissingFileError: there is nothing at such an address.
      UserError: it cannot be reached.
    """
    if "://" not in str(folder):
        return Path(folder)
    with explained(folder):
        found = epath.Path(str(folder))
        if not found.exists():
            raise MissingFileError(f"{folder}: there is nothing at this address")
        return found


def cache_home() -> Path:
    """Where this user keeps what can be made or fetched again."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safetydpo_jax"
    return Path(os.environ.get(CACHE_DIR) or home)


def fetched(folder: Any, remedy: str) -> Path:
    """The folder itself, or its copy on this host, which is fetched if it is not there or older.

    Args:
      folder: from `open_folder`, with a card that lists its files.
      remedy: what the user should do if it is damaged; ends the error's sentence.

    Raises:
      UserError: it cannot be reached, a file is not the one that the card lists, or the disk is
        full.
    """
    if isinstance(folder, Path):
        return folder
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    copy = cache_home() / name
    waiting = functools.partial(say, f"{folder}: another process fetches it")
    with storage.held(copy.with_suffix(".lock"), waiting):
        with explained(folder):
            card = (folder / storage.CARD).read_bytes()
        here = copy / storage.CARD
        if not here.is_file() or here.read_bytes() != card:
            here.unlink(missing_ok=True)
            with explained(folder):
                files = storage.listed_files(storage.parse_card(folder, remedy))
            _fetch(folder, copy, files, remedy)
            with storage.explained_writes(here):
                copy.mkdir(exist_ok=True)
                storage.write_file(here, card)
    return copy


def _fetch(folder: Any, copy: Path, files: dict[str, tuple[int, str]], remedy: str) -> None:
    """Brings the files that are not there yet."""
    missing = {}
    for name, (size, sha256) in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder}: {storage.CARD} lists a file outside its folder: {remedy}")
        file = copy / name
        if not file.is_file() or file.stat().st_size != size or storage.hash_file(file) != sha256:
            missing[name] = size

    def fetch(name: str, copied: Callable[[int], None]) -> str:
        return download(folder / name, copy / name, copied)

    for name, sha256 in copied_files(missing, fetch, f"{folder}: fetching", say):
        if sha256 != files[name][1]:
            (copy / name).unlink()
            raise UserError(
                f"{folder / name} is damaged: it is not the file that {storage.CARD} lists; "
                f"{remedy}"
            )
    for file in copy.rglob("*"):  # of an older set at the same address
        if file.is_file() and file.relative_to(copy).as_posix() not in files:
            file.unlink()


def say(line: str) -> None:
    """Prints a line that is seen at once."""
    print(line, flush=True)


def copied_files(
    sizes: Mapping[str, int],
    copy: Callable[[str, Callable[[int], None]], _Result],
    what: str,
    progress: Callable[[str], None],
) -> Iterator[tuple[str, _Result]]:
    """Copies files, several at a time; yields each name, once it is done, with what `copy` gave.

    Small files come first; of large ones no more than `_LARGE_AT_ONCE` are under way, so that a
    kill costs no more than those. If a copy fails, or whoever asks for the next name gives up, the
    others end at their next part; those that are whole are yielded before the error is raised.

    Args:
      sizes: of the files, in bytes, by name.
      copy: is called in a thread with a name and what it has to call with the bytes of each part,
        which raises `CancelledError` if it should end.
      what: is done with them; begins each line.
      progress: takes lines of text.
    """
    total, done = sum(sizes.values()), 0
    pace, lock, given_up = Pace(total), threading.Lock(), threading.Event()
    large = threading.BoundedSemaphore(_LARGE_AT_ONCE)

    def go_on() -> None:
        if given_up.is_set():
            raise concurrent.futures.CancelledError

    def copy_one(name: str) -> _Result:
        with large if sizes[name] > _BLOCK else contextlib.nullcontext():
            go_on()
            return copy(name, copied)

    def copied(count: int) -> None:
        nonlocal done
        go_on()
        with lock:
            done += count
            if total > done and pace.due(done):
                progress(
                    f"{what} {done / 1e6:.0f} of {total / 1e6:.0f} MB, "
                    f"{pace.rate(done) / 1e6:.0f} MB/s, {pace.left(done):.0f} s left"
                )

    failed: BaseException | None = None
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            names = {
                pool.submit(copy_one, name): name
                for name in sorted(sizes, key=lambda name: sizes[name])
            }
            for future in concurrent.futures.as_completed(names):
                if error := future.exception():
                    failed = failed or error
                    given_up.set()
                else:
                    yield names[future], future.result()
        finally:
            given_up.set()
    if failed:
        raise failed
    if sizes:
        progress(f"{what} {len(sizes)} files, {total / 1e6:.1f} MB: done")


def download(there: Any, here: Path, copied: Callable[[int], None]) -> str:
    """Copies a file to this host, whole or not at all; returns its SHA-256.

    Args:
      there: from `open_folder`, or of it.
      here: its place; folders are made.
      copied: is called with the bytes of each part.

    Raises:
      UserError: it cannot be read, or the disk is full.
    """
    found = hashlib.sha256()
    with storage.explained_writes(here):
        here.parent.mkdir(parents=True, exist_ok=True)
        with storage.new_file(here) as file:
            for block in blocks(there):
                found.update(block)
                file.write(block)
                copied(len(block))
    return found.hexdigest()


def upload(here: Path, there: Any, copied: Callable[[int], None]) -> tuple[int, str]:
    """Copies a file of this host; returns its size and SHA-256.

    Args:
      here: the file.
      there: its place, in a folder that exists or of a bucket, which needs none.
      copied: is called with the bytes of each part.

    Raises:
      UserError: it cannot be written, or did not arrive whole.
    """
    found, size = hashlib.sha256(), 0
    with explained(there), there.open("wb") as opened:
        for block in blocks(here):
            found.update(block)
            opened.write(block)
            size += len(block)
            # When others have failed this one goes on: half of it would look like a file.
            with contextlib.suppress(concurrent.futures.CancelledError):
                copied(len(block))
    with explained(there):
        arrived = there.stat().length
    if arrived != size:
        raise UserError(f"{there} has {arrived} bytes of {size}: it did not arrive whole")
    return size, found.hexdigest()


def blocks(file: Any) -> Iterator[bytes]:
    """A file's bytes, here or in a bucket, in parts that fit in memory."""
    with explained(file), file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            yield block


def reading(folder: Any) -> contextlib.AbstractContextManager[None]:
    """`explained`, if the folder from `open_folder` is not on this host."""
    return contextlib.nullcontext() if isinstance(folder, Path) else explained(folder)


@contextlib.contextmanager
def explained(address: Any) -> Iterator[None]:
    """Turns what the libraries of buckets raise, which is no one kind, into a `UserError`.

    `UnreachableError` but for what says that it will not be otherwise next time.
    """
    try:
        yield
    except (UserError, MissingFileError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{address}: there is no such file") from error
    except ImportError as error:
        raise UserError(
            f"{address}: to reach it takes more packages: pip install 'safetydpo-jax[gcs]' for "
            f"gs://, s3fs for s3:// ({error})"
        ) from error
    except Exception as error:
        reason, refused = first_line(error), isinstance(error, (PermissionError, ValueError))
        # Google's, of no class in common.
        refused |= "Credentials" in type(error).__name__ or reason.startswith("Forbidden")
        refused |= getattr(error, "code", None) in (401, 403)
        raise (UserError if refused else UnreachableError)(
            f"{address} cannot be reached ({reason}): look at the address, and whether this host "
            "may read and write there (gcloud auth application-default login)"
        ) from error
