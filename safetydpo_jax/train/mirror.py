"""A run's folder that is kept in a bucket too, so that the run outlives the machine it is on.

    --workdir gs://bucket/runs/hate

The run works in a folder of this host. After each phase and each checkpoint what has changed there
is copied to the address, and last of all `mirror.json`, which lists what belongs together: a
machine may vanish at any moment, and another goes on from what that file lists. What is not in the
bucket any more is computed again; whoever deletes the folder there starts the run anew.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from safetydpo_jax import storage
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.remote import cache_home, copied_files, download, explained, upload

LIST = "mirror.json"
_KNOWN = ".mirror.json"  # on this host: what the mirror's list was when they were last the same
# What is not copied, besides hidden files: large tables that can be computed again, what is not
# whole yet.
_LEFT_OUT = {"reference"}
_UNFINISHED = (".writing", ".partial", ".old")
_BEGINS_ANEW = {"checkpoints", "health"}  # folders that may be deleted there
_REMEDY = "delete the folder checkpoints there to train anew"
_WHOLE = {"pairs", "cache"}  # folders of which no file means anything without the others


class Workdir:
    """Where a run works, and its mirror in a bucket; without one nothing here does anything.

    Args:
      given: a folder of this host, or an address like gs://bucket/folder.
      progress: takes lines of text.

    Attributes:
      folder: on this host.
      address: of the mirror; "" without one.

    Raises:
      UserError: an address that cannot be.
    """

    def __init__(self, given: str | Path, progress: Callable[[str], None]):
        self._progress = progress
        self.folder, self.address = Path(given), ""
        if "://" in str(given):
            self.address = str(given).rstrip("/")
            path = self.address.partition("://")[2]
            if "/" not in path or ".." in path.split("/"):
                raise UserError(f"--workdir {given}: write an address like gs://bucket/folder")
            name = hashlib.sha256(self.address.encode()).hexdigest()[:16]
            self.folder = cache_home() / "runs" / name

    def fetch(self) -> None:
        """Makes the folder what the mirror is, unless it is already that, or goes on from it.

        Raises:
          UserError: the address cannot be reached or written to, a file is damaged, or the disk is
            full.
        """
        if not self.address:
            return
        listed, known = self._listed(), self._known()
        files = listed.get("files", {})
        same = listed.get("id") == known.get("id")
        if emptied := self._emptied(files):
            for folder, names in emptied.items():
                shutil.rmtree(self.folder / folder, ignore_errors=True)
                for name in names:
                    del files[name]
                self._progress(f"{self.address}/{folder} was deleted, and begins anew")
            listed = self._list(files)
        if same and (deleted := self._deleted(files)):
            for name in deleted:  # the next `update` copies what this host has of it
                del files[name]
            listed = self._list(files)
        with storage.explained_writes(self.folder):
            if not same:
                self._remember({"id": "half fetched"})
                self._remove(set(self._files()) - set(files))  # of another history of this run
            missing = {
                name: entry["bytes"]
                for name, entry in files.items()
                if not (file := self.folder / name).is_file()
                or (not same and storage.hash_file(file) != entry["sha256"])
            }
            what = f"{self.address}: fetching"
            gone = []
            for name, sha256 in copied_files(missing, self._download, what, self._progress):
                if sha256 is None:
                    gone.append(name)
                # Logs may have gone on when the machine vanished; checkpoints never change.
                elif _is_of_checkpoint(name) and sha256 != files[name]["sha256"]:
                    raise UserError(
                        f"{self.address}/{name} is damaged: it is not the file that {LIST} lists; "
                        + _REMEDY
                    )
            for name in gone:
                if name in files:  # not yet gone with another
                    self._forget_folder_of(name, files)
            for name in missing.keys() & files.keys() if same else files:
                changed = files[name]["changed"]  # by which `update` knows what has changed
                os.utime(self.folder / name, ns=(changed, changed))
            if not listed:  # now, not after hours: whether this host may write there
                listed = self._list({})
            self._remember(listed)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Within, errors name the address in place of the folder: there is what they advise on."""
        try:
            yield
        except UserError as error:
            said = str(error)
            if not self.address or str(self.folder) not in said:
                raise
            raise type(error)(said.replace(str(self.folder), self.address)) from error

    def update(self, *, must: bool = True) -> None:
        """Brings the mirror up to date.

        Args:
          must: else an address that cannot be reached is told, and tried again the next time.

        Raises:
          UserError: another run writes there too, or it cannot be reached and must be.
        """
        if not self.address:
            return
        known = self._known()
        files, now = known.get("files", {}), self._files()
        changed = {
            name: stat.st_size
            for name, stat in now.items()
            if stat.st_mtime_ns != files.get(name, {}).get("changed")
        }
        gone = set(files) - set(now)
        if not changed and not gone:
            return
        try:
            alone = self._listed().get("id") == known.get("id")
            alone = alone and self._send(changed, gone, known)
        except UserError as error:
            if must:
                raise
            self._progress(f"{error}; it is tried again at the next checkpoint")
            return
        if not alone:
            raise UserError(
                f"{self.address}: another run has written there meanwhile: stop one of them, or "
                "give each its own --workdir"
                if self._listed()
                else f"{self.address}: its {LIST} is gone, as if somebody deleted that folder "
                "while the run went on: the same command starts anew"
            )

    def _send(
        self, changed: Mapping[str, int], gone: Collection[str], known: Mapping[str, Any]
    ) -> bool:
        """Whether no other run wrote there meanwhile."""
        files = {k: entry for k, entry in known.get("files", {}).items() if k not in gone}
        # Of pairs and caches new files must not be taken for a part of the old.
        if replaced := {k for k in changed.keys() & files.keys() if _WHOLE & _parts(k)}:
            files = {k: entry for k, entry in files.items() if k not in replaced}
            known = self._list(files)
            self._remember(known)
        what = f"{self.address}: copying"
        files |= copied_files(changed, self._upload, what, self._progress)
        if self._listed().get("id") != known.get("id"):
            return False
        self._remember(self._list(files))
        with explained(self.address):
            for name in gone:
                (epath.Path(self.address) / name).unlink(missing_ok=True)
        return True

    def _list(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Writes what the mirror has; returns it."""
        listed = {"id": secrets.token_hex(8), "files": files}
        with explained(self.address):
            file = epath.Path(self.address) / LIST
            file.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n")
        return listed

    def _forget_folder_of(self, missing: str, files: dict[str, Any]) -> None:
        """Drops what belongs to a file that is gone: without it the rest is nothing whole.

        That is what is beside it, and of pairs and caches all that there is.
        """
        *folders, _ = missing.split("/")
        depth = _depth(missing, _WHOLE)

        def place(name: str) -> list[str]:
            return name.split("/")[:-1][:depth]

        for name in [name for name in files if place(name) == folders[:depth]]:
            del files[name]
            (self.folder / name).unlink(missing_ok=True)
        self._progress(f"{self.address}/{missing} is gone: what it was a part of is made again")

    def _emptied(self, files: Collection[str]) -> dict[str, list[str]]:
        """Folders of checkpoints and evaluations of which nothing is there any more; their files.

        Somebody deleted them, as our errors advise, to have it begin anew.
        """
        folders: dict[str, list[str]] = {}
        for name in files:
            if depth := _depth(name, _BEGINS_ANEW):
                folders.setdefault("/".join(name.split("/")[:depth]), []).append(name)
        there = epath.Path(self.address)
        with explained(self.address):
            return {
                folder: names
                for folder, names in folders.items()
                if not any((there / name).exists() for name in names)
            }

    def _deleted(self, files: Collection[str]) -> list[str]:
        """Of pairs and caches, which others read there, the files that are not there any more."""
        with explained(self.address):
            return [
                name
                for name in files
                if _WHOLE & _parts(name) and not (epath.Path(self.address) / name).exists()
            ]

    def _files(self) -> dict[str, Any]:
        """What is to be in the mirror: the files' stat by name."""
        found = {}
        for file in sorted(self.folder.rglob("*")):
            parts = file.relative_to(self.folder).parts
            unwanted = any(
                part in _LEFT_OUT
                or part.startswith(".")
                or part.endswith(_UNFINISHED)
                or "checkpoint-tmp" in part  # Orbax's
                for part in parts
            )
            if not unwanted and file.is_file():
                found["/".join(parts)] = file.stat()
        return found

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            file = self.folder / name
            file.unlink()
            for folder in file.relative_to(self.folder).parents[:-1]:
                with contextlib.suppress(OSError):  # there are other files in it
                    (self.folder / folder).rmdir()

    def _listed(self) -> dict[str, Any]:
        """What the mirror's list says; empty without one."""
        file = epath.Path(self.address) / LIST
        with explained(self.address):
            text = file.read_text() if file.exists() else "{}"
        try:
            listed = json.loads(text)
            for name in listed.get("files", {}):
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError("it lists a file outside its folder")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{file} is no list of this program ({error}): delete that folder to start anew"
            ) from error
        return listed

    def _known(self) -> dict[str, Any]:
        file = self.folder / _KNOWN
        return json.loads(file.read_bytes()) if file.is_file() else {}

    def _remember(self, listed: Mapping[str, Any]) -> None:
        storage.write_file(self.folder / _KNOWN, json.dumps(listed).encode())

    def _download(self, name: str, copied: Callable[[int], None]) -> str | None:
        """Copies a file here; returns its SHA-256, None if it is gone and can be made again."""
        try:
            return download(epath.Path(self.address) / name, self.folder / name, copied)
        except MissingFileError:
            if _is_of_checkpoint(name):
                raise UserError(
                    f"{self.address}/{name} is gone, a part of a checkpoint; {_REMEDY}"
                ) from None
            return None

    def _upload(self, name: str, copied: Callable[[int], None]) -> dict[str, Any]:
        """Copies a file there; returns its entry in the list."""
        file = self.folder / name
        changed = file.stat().st_mtime_ns  # before it is read: what comes later is copied again
        size, sha256 = upload(file, epath.Path(self.address) / name, copied)
        return {"bytes": size, "sha256": sha256, "changed": changed}


def _parts(name: str) -> set[str]:
    return set(name.split("/"))


def _depth(name: str, among: Collection[str]) -> int | None:
    """How many parts of a file's name lead to the first folder among these; None without one."""
    folders = name.split("/")[:-1]
    return next((i for i, folder in enumerate(folders, 1) if folder in among), None)


def _is_of_checkpoint(name: str) -> bool:
    return "checkpoints" in _parts(name)
