"""Locks on disks that have none."""

import errno
import fcntl

import pytest

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.train.workdir import lock_workdir


@pytest.mark.parametrize("hold", [lock_workdir, lambda path: storage.held(path / "lock")])
def test_a_disk_without_locks(hold, tmp_path, monkeypatch):
    def refused(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    message = "is on a disk that cannot lock files .Function not implemented.: choose another"
    with pytest.raises(UserError, match=message), hold(tmp_path):
        pass
