"""Pair sets and caches in a bucket, behind a server that speaks Google Cloud Storage's protocol."""

import json
import threading
import time
from concurrent.futures import CancelledError

import jax
import numpy as np
import pytest

from safetydpo_jax import remote as fetching
from safetydpo_jax.data import Cache, PairSet, make_cache, open_pairs
from safetydpo_jax.data.pairs import JoinedPairs
from safetydpo_jax.errors import MissingFileError, UserError


def upload(folder, to):
    for file in folder.rglob("*"):
        if file.is_file():
            (to / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


def pixels(pairs):
    return [picture.pixels for split in pairs.sizes for picture in pairs.pictures(split)]


def test_a_pair_set(bucket, write, tmp_path, capsys):
    folder = write()
    upload(folder, bucket / "pairs")
    pairs = open_pairs(str(bucket / "pairs"), verify=True)
    assert pairs.card == PairSet(folder).card
    assert not (tmp_path / "fetched").exists()  # the card is all that was asked for
    for _ in range(2):
        np.testing.assert_array_equal(pixels(pairs), pixels(PairSet(folder)))
        pairs = PairSet(str(bucket / "pairs"))
    said = capsys.readouterr().out
    assert said.count("fetching") == 1
    assert said.splitlines()[-1].endswith("fetching 5 files, 0.4 MB: done")


def test_several_read_as_one(bucket, write, tmp_path):
    folder = write()
    upload(folder, bucket / "sets" / "hate")
    upload(write(num_pairs=2, mark="v"), bucket / "sets" / "violence")
    joined = open_pairs(str(bucket / "sets"))
    assert isinstance(joined, JoinedPairs)
    assert joined.parts == {"hate": 5, "violence": 2}
    assert len(pixels(joined)) == 2 * 7 + 6


def test_a_cache(bucket, write, config, pipeline, silent, tmp_path):
    folder = write()
    made = make_cache(config, pipeline, tmp_path / "run", silent)
    upload(folder, bucket / "pairs")
    upload(made.folder, bucket / "cache")
    config.pairs.path, config.cache.path = str(bucket / "pairs"), str(bucket / "cache")
    found = make_cache(config, pipeline, tmp_path / "other", silent)
    records = np.arange(13)
    jax.tree.map(np.testing.assert_array_equal, found.read(records), made.read(records))
    assert len([f for f in (tmp_path / "fetched").iterdir() if f.is_dir()]) == 1  # pairs are not
    config.cache.dtype = "float16"
    with pytest.raises(UserError, match=r"cache is a cache of other pairs, another model or other"):
        make_cache(config, pipeline, tmp_path / "other", silent)


def test_another_set_at_the_same_address(bucket, write, capsys):
    upload(write(), bucket / "pairs")
    pixels(open_pairs(str(bucket / "pairs")))
    folder = write(num_pairs=6)
    upload(folder, bucket / "pairs")
    found = open_pairs(str(bucket / "pairs"))
    np.testing.assert_array_equal(pixels(found), pixels(PairSet(folder)))
    assert capsys.readouterr().out.count("fetching") == 2


def test_what_is_there_is_not_fetched_again(bucket, write, tmp_path, capsys):
    upload(write(), bucket / "pairs")
    pixels(open_pairs(str(bucket / "pairs")))
    (copy,) = (f for f in (tmp_path / "fetched").iterdir() if f.is_dir())
    (copy / "card.json").unlink()  # as if it was killed before the end
    next(copy.rglob("*unsafe*")).unlink()
    capsys.readouterr()
    pixels(open_pairs(str(bucket / "pairs")))
    assert "fetching 1 files" in capsys.readouterr().out


def test_damage(bucket, write):
    upload(write(), bucket / "pairs")
    file = next((bucket / "pairs").glob("*/*/*unsafe*"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    with pytest.raises(UserError, match=r"unsafe.* is damaged: it is not the file that card.json"):
        pixels(open_pairs(str(bucket / "pairs")))
    file.unlink()
    with pytest.raises(MissingFileError, match="there is no such file"):
        pixels(open_pairs(str(bucket / "pairs")))


@pytest.mark.parametrize("name", ["../out", "/tmp/out"])
def test_a_card_that_leads_out_of_its_folder(bucket, write, tmp_path, name):
    folder = write()
    card = json.loads((folder / "card.json").read_text())
    card["files"][name] = {"bytes": 1, "sha256": "0"}
    upload(folder, bucket / "pairs")
    (bucket / "pairs" / "card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="lists a file outside its folder"):
        pixels(open_pairs(str(bucket / "pairs")))
    assert not list(tmp_path.glob("fetched/out"))


def test_nothing_there(bucket, monkeypatch):
    with pytest.raises(MissingFileError, match="there is nothing at this address"):
        open_pairs(str(bucket / "none"))
    with pytest.raises(MissingFileError, match="there is nothing at this address"):
        Cache(str(bucket / "none"))
    with pytest.raises(UserError, match=r"xx://bucket/x cannot be reached"):
        open_pairs("xx://bucket/x")


def test_a_package_that_is_missing(bucket, monkeypatch):
    def missing(*args):
        raise ImportError("no gcsfs")

    monkeypatch.setattr(fetching.epath, "Path", missing)
    with pytest.raises(UserError, match=r"pip install 'safetydpo-jax\[gcs\]'"):
        open_pairs(str(bucket / "pairs"))


def test_files_are_copied_several_at_a_time():
    both, said = threading.Barrier(2), []

    def copy(name, copied):
        both.wait(timeout=10)
        copied(5)
        return name.upper()

    sizes = {"a": 5, "b": 5}
    assert dict(fetching.copied_files(sizes, copy, "copying", said.append)) == {"a": "A", "b": "B"}
    assert said == ["copying 2 files, 0.0 MB: done"]


def test_a_copy_that_fails_ends_the_others():
    begun, arrived, said = threading.Event(), [], []

    def copy(name, copied):
        if name == "bad":
            begun.wait(timeout=10)
            raise UserError("it cannot be reached")
        begun.set()
        for _ in range(1000):
            time.sleep(0.01)
            copied(1)
        arrived.append(name)

    sizes = {"good": 1000, "bad": 1} | {f"later{i}": 1000 for i in range(20)}
    with pytest.raises(UserError, match="it cannot be reached"):
        dict(fetching.copied_files(sizes, copy, "copying", said.append))
    assert not arrived
    assert not said


def test_what_is_whole_counts_though_another_failed():
    failed = threading.Event()

    def copy(name, copied):
        if name == "bad":
            failed.set()
            raise UserError("it cannot be reached")
        failed.wait(timeout=10)
        return name.upper()

    came = {}
    copies = fetching.copied_files({"good": 1, "bad": 1}, copy, "copying", print)
    with pytest.raises(UserError, match="it cannot be reached"):
        came.update(copies)
    assert came == {"good": "GOOD"}


def test_who_gives_up_ends_all():
    begun, ended = threading.Event(), []

    def copy(name, copied):
        (begun.wait if name == "short" else begun.set)()
        while name == "long":
            time.sleep(0.01)
            try:
                copied(1)
            except CancelledError:
                ended.append(name)
                raise

    for name, _ in fetching.copied_files({"short": 1, "long": 2}, copy, "copying", print):
        assert name == "short"
        break
    assert ended == ["long"]


def test_few_large_files_are_under_way(monkeypatch):
    monkeypatch.setattr(fetching, "_BLOCK", 10)
    now, most, lock = 0, 0, threading.Lock()

    def copy(name, copied):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    sizes = {f"{i}": 11 for i in range(8)}
    assert len(dict(fetching.copied_files(sizes, copy, "copying", print))) == 8
    assert most == 2
