"""What one process of a job waits for of another's."""

import pytest

from safetydpo_jax import data
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.train import expert
from safetydpo_jax.train.expert import _cache_once_seen


class Found(data.Cache):
    """One of a key, and no more."""

    def __init__(self, key):
        self.key = key


@pytest.fixture
def disk(monkeypatch):
    """What opening the cache finds, time after time, a second apart; the last for ever."""
    now, findings = [0.0], []

    def open_(folder):
        found = findings.pop(0) if len(findings) > 1 else findings[0]
        if isinstance(found, Exception):
            raise found
        return Found(found)

    monkeypatch.setattr(data, "Cache", open_)
    monkeypatch.setattr(expert.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(expert.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    return findings


def test_a_cache_that_is_seen_late(disk, tmp_path):
    disk += [MissingFileError("none"), UserError("damaged"), "old", "new"]
    assert _cache_once_seen(tmp_path, "new").key == "new"
    assert disk == ["new"]


@pytest.mark.parametrize(
    ("found", "message"), [(MissingFileError("none"), "none"), ("old", "is another cache here")]
)
def test_one_that_is_never_seen(found, message, disk, tmp_path):
    disk.append(found)
    with pytest.raises(UserError, match=message):
        _cache_once_seen(tmp_path, "new")
    assert expert.time.monotonic() > expert.SEEN_SECONDS
