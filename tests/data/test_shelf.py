"""A cache of which hosts that share a bucket alone make a part each."""

import jax
import numpy as np
import pytest

from safetydpo_jax.data import encode, encode_part, make_cache, shelf
from safetydpo_jax.errors import UserError
from tests.data.conftest import killed_at_the_fourth_shard


@pytest.fixture
def address(bucket):
    return f"{bucket}/run/cache.partial"


@pytest.fixture
def host(write, config, pipeline, tmp_path, address, monkeypatch):
    """Makes a part, or all that is missing, in a folder of a host's own; what it gave and said."""
    config.pairs.path = str(write())
    monkeypatch.setattr(encode, "ENCODE_BATCH", 2)

    def host(name, part=None):
        said = []
        where = config, pipeline, tmp_path / name, said.append
        made = (
            encode_part(*where, part, shelf=address) if part else make_cache(*where, shelf=address)
        )
        return made, said

    return host


def test_parts_of_hosts_make_one_cache(host, config, pipeline, tmp_path, address, bucket):
    whole = make_cache(config, pipeline, tmp_path / "alone", lambda line: None)
    assert [host(f"host{i}", (i, 3))[0] for i in (2, 0, 1)] == [None] * 3
    made, said = host("host0")
    assert said[0] == "cache: encoding 13 pictures in 7 shards, 7 there already"
    assert said[1].startswith("cache: fetching shards 4 files")
    assert made.key == whole.key
    for file in whole.folder.iterdir():
        assert (made.folder / file.name).read_bytes() == file.read_bytes()
    jax.tree.map(np.testing.assert_array_equal, made.read(np.arange(13)), whole.read(np.arange(13)))
    shelf.clear(address)
    shelf.clear(address)  # of nothing
    assert not (bucket / "run" / "cache.partial").exists()


def test_what_a_lost_machine_had_encoded_is_not_encoded_again(host):
    with killed_at_the_fourth_shard():
        host("lost")
    _, said = host("another")
    left = next(line for line in said if "pictures, " in line)
    assert left.startswith(("cache: 7/7 ", "cache: 9/9 "))  # the last was perhaps on its way


def test_a_shard_that_was_not_sent_is_sent_by_the_next_start(host, bucket):
    host("host", (1, 3))
    place = next((bucket / "run" / "cache.partial").iterdir())
    lacking = min(file.name for file in place.iterdir())
    assert not lacking.endswith(".sha256")
    (place / f"{lacking}.sha256").unlink()  # a kill came before it
    host("host", (1, 3))
    assert (place / f"{lacking}.sha256").exists()


def test_a_damaged_shard(host, bucket):
    host("host", (0, 3))
    place = next((bucket / "run" / "cache.partial").iterdir())
    file = next(file for file in place.iterdir() if not file.name.endswith(".sha256"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(UserError, match="is damaged: it is not what was sent there; delete the"):
        host("another")


def test_a_bucket_that_does_not_answer(host, monkeypatch):
    def refused(*arguments):
        raise UserError("gs://bucket cannot be reached")

    monkeypatch.setattr(shelf, "upload", refused)
    with pytest.raises(UserError, match="cannot be reached"):
        host("host", (0, 3))  # whose shards are of use there alone
    made, said = host("alone")
    assert len(made.read(np.arange(13))[1].prompt_embeds) == 13
    assert "gs://bucket cannot be reached; the shard is on this host alone" in said


def test_a_part_does_not_trust_what_an_earlier_run_left_on_its_host(host, address, bucket):
    assert host("host")[0]
    shelf.clear(address)
    assert host("host", (1, 3))[0] is None
    there = next((bucket / "run" / "cache.partial").iterdir()).iterdir()
    assert len([file for file in there if file.name.endswith(".sha256")]) == 2


def test_a_hash_without_its_shard(host, bucket):
    host("host", (1, 3))
    place = next((bucket / "run" / "cache.partial").iterdir())
    for file in place.glob("*.array_record"):
        file.unlink()  # as a removal that was killed
    made, _ = host("another")
    assert len(made.read(np.arange(13))[1].prompt_embeds) == 13
