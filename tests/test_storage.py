"""Folders that replace others, and locks on disks that have none."""

import errno
import fcntl
import pathlib

import pytest

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.train.workdir import lock_workdir


def test_a_folder_takes_the_place_of_another(tmp_path):
    """And of what stands beside it only what is its own is removed."""
    path, kept = tmp_path / "pairs", tmp_path / "pairs.old"
    for folder in (path, kept):
        folder.mkdir()
        (folder / "a").write_text("1")
    with storage.new_folder(path) as folder:
        (folder / "b").write_text("2")
    assert [file.name for file in path.iterdir()] == ["b"]
    assert (kept / "a").is_file()
    assert sorted(tmp_path.iterdir()) == [path, kept]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path, rename = tmp_path / "pairs", pathlib.Path.rename
    path.mkdir()
    (path / "a").write_text("1")

    def fail(self, target):
        if self.name.endswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(UserError, match="could not write"), storage.new_folder(path) as folder:
        (folder / "b").write_text("2")
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hold", [lock_workdir, lambda path: storage.held(path / "lock")])
def test_a_disk_without_locks(hold, tmp_path, monkeypatch):
    def refused(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    message = "is on a disk that cannot lock files .Function not implemented.: choose another"
    with pytest.raises(UserError, match=message), hold(tmp_path):
        pass
