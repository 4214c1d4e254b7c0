"""Picture files by name, in a folder or a zip; whatever their names say, nothing else is read."""

import collections
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from safetydpo_jax.data.inputs.pair import BadPictureError, check_size
from safetydpo_jax.data.inputs.picture import MAX_BYTES
from safetydpo_jax.errors import MissingFileError, UserError

# What zipfile says of a damaged archive, or of one that is written in a newer way than it knows.
_UNREADABLE = (zipfile.BadZipFile, NotImplementedError, OSError, ValueError)


def open_pictures(path: Path, *, by_name: bool = False) -> Callable[[str], bytes]:
    """A reader of the pictures in a folder, also below it, or in a .zip.

    It takes a name, means the file at that path or else the only one whose path ends in it, and
    raises a `BadPictureError` if there is none or must not or cannot be read. Threads may share it.

    Args:
      path: of the folder or zip.
      by_name: folders before a name mean nothing, as where no two pictures are named alike.

    Raises:
      MissingFileError: there is neither.
      UserError: it is no zip that can be read.
    """
    if path.is_dir():
        return _Folder(path, by_name).read
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such folder or zip of pictures")
    return _Zip(path, by_name).read


class _Names:
    """Which path a name means."""

    def __init__(self, paths: Iterable[str], by_name: bool):
        self._paths, self._by_name_alone = collections.Counter(paths), by_name
        self._by_name = collections.defaultdict(list)
        for path in self._paths:
            self._by_name[PurePosixPath(path).name].append(path)

    def find(self, name: str) -> str:
        path = PurePosixPath(name)
        if "\\" in name:
            raise BadPictureError("backslash in its name: write folder/picture.png")
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
            raise BadPictureError("path that leads out of the pictures' folder")
        found = [str(path)] if str(path) in self._paths else self._by_name[path.name]
        if not self._by_name_alone:  # unsafe/1.png is not to stand for a missing safe/1.png
            found = [x for x in found if PurePosixPath(x).parts[-len(path.parts) :] == path.parts]
        if not found:
            raise BadPictureError("no such picture")
        if len(found) > 1 or self._paths[found[0]] > 1:
            raise BadPictureError("several pictures of this name")
        return found[0]


class _Folder:
    def __init__(self, folder: Path, by_name: bool):
        self._root = folder.resolve()
        files = (f for f in self._root.rglob("*") if not f.is_dir())
        self._names = _Names((f.relative_to(self._root).as_posix() for f in files), by_name)

    def read(self, name: str) -> bytes:
        path = (self._root / self._names.find(name)).resolve()
        if not path.is_relative_to(self._root):
            raise BadPictureError("path that leads out of the pictures' folder")  # by a link
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadPictureError("no regular file")
            check_size(status.st_size, MAX_BYTES)
            return path.read_bytes()
        except OSError as error:
            raise BadPictureError("file that cannot be read") from error


class _Zip:
    """Members are read one by one, never unpacked to the disk."""

    def __init__(self, path: Path, by_name: bool):
        try:
            self._zip = zipfile.ZipFile(path)
            members = [m for m in self._zip.infolist() if not m.is_dir()]
        except _UNREADABLE as error:
            raise UserError(
                f"{path}: no zip file, or a damaged one ({error}): download it again"
            ) from error
        self._members = {m.filename: m for m in members}
        self._names = _Names((m.filename for m in members), by_name)

    def read(self, name: str) -> bytes:
        member = self._members[self._names.find(name)]
        if member.flag_bits & 1:
            raise BadPictureError("encrypted")
        check_size(member.file_size, MAX_BYTES)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadPictureError("compressed in an uncommon way")  # whose reader knows no bound
        try:
            with self._zip.open(member) as file:
                return file.read(member.file_size)  # `read()` would unpack more than it says
        except (*_UNREADABLE, zlib.error, EOFError) as error:
            raise BadPictureError("file that cannot be read") from error
