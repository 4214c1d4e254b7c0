"""Shards of a cache in a bucket while it is made: hosts that share no disk bring theirs there.

    SHELF/KEY/pictures-00000-of-00006.array_record
    SHELF/KEY/pictures-00000-of-00006.array_record.sha256   comes after it, so it is whole

The host that makes the cache of them takes what it has not. A machine that vanishes leaves there
what it has encoded, and another goes on.
"""

import concurrent.futures
from collections.abc import Callable, Collection
from pathlib import Path

from etils import epath

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.remote import copied_files, download, explained, upload

_WHOLE = ".sha256"


class Shelf:
    """The shards of one cache there; without an address nothing here does anything.

    Args:
      address: like gs://bucket/folder, or "".
      key: of the cache.
      tell: takes a line of text where a shard cannot be put, which then is not there; without it
        that is an error.
    """

    def __init__(self, address: str, key: str, tell: Callable[[str], None] | None = None):
        self._tell = tell
        self._folder = epath.Path(address) / key[:16] if address else None
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._sending: concurrent.futures.Future | None = None

    def names(self) -> set[str]:
        """The shards that are there whole."""
        if self._folder is None:
            return set()
        with explained(self._folder):
            if not self._folder.exists():
                return set()
            found = {file.name for file in self._folder.glob("*")}  # asks anew
        return {name for name in found if f"{name}{_WHOLE}" in found}

    def put(self, shard: Path) -> None:
        """Sends a shard there while the next is computed.

        Raises:
          UserError: as `sent`, of the one before.
        """
        if self._folder is not None:
            self.sent()
            self._sending = self._pool.submit(self._send, shard)

    def sent(self) -> None:
        """Waits until what was put is there.

        Raises:
          UserError: it cannot be reached.
        """
        sending, self._sending = self._sending, None
        try:
            if sending is not None:
                sending.result()
        except UserError as error:
            if self._tell is None:
                raise
            self._tell(f"{error}; the shard is on this host alone")

    def take(self, shards: Collection[str], folder: Path, progress: Callable[[str], None]) -> None:
        """Fetches those of some shards that are there and not in a folder of this host.

        Raises:
          UserError: one is damaged, or cannot be reached, or the disk is full.
        """
        if self._folder is None:
            return
        there, sizes = self._folder, {}
        for name in sorted(self.names().intersection(shards)):
            if not (folder / name).exists():
                with explained(there):
                    sizes[name] = (there / name).stat().length
        places = {name: storage.unfinished(folder / name) for name in sizes}
        fetch = lambda name, copied: download(there / name, places[name], copied)  # noqa: E731
        for name, sha256 in copied_files(sizes, fetch, "cache: fetching shards", progress):
            with explained(there):
                wanted = (there / f"{name}{_WHOLE}").read_text()
            if sha256 != wanted:
                places[name].unlink()
                raise UserError(
                    f"{there / name} is damaged: it is not what was sent there; delete the folder "
                    f"{there.parent} to have it encoded again"
                )
            places[name].replace(folder / name)

    def _send(self, shard: Path) -> None:
        assert self._folder is not None
        with explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        _, sha256 = upload(shard, self._folder / shard.name, lambda count: None)
        with explained(self._folder):
            (self._folder / f"{shard.name}{_WHOLE}").write_text(sha256)


def clear(address: str) -> None:
    """Removes all shelves at an address, which the caches themselves have replaced."""
    folder = epath.Path(address)
    with explained(folder):
        if folder.exists():
            folder.rmtree()
