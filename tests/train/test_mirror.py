"""A run's folder and its mirror in a bucket, and another machine that takes it up."""

import json
import threading
import time

import pytest

from safetydpo_jax import remote
from safetydpo_jax.errors import UserError
from safetydpo_jax.remote import CACHE_DIR
from safetydpo_jax.train import mirror
from safetydpo_jax.train.mirror import LIST, Workdir


class Killed(BaseException):
    """Stands for the end of the machine."""


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch):
    """A `Workdir` of the same address on a machine of this name, and what it says."""

    def machine(name):
        monkeypatch.setenv(CACHE_DIR, str(tmp_path / name))
        said = []
        found = Workdir(f"{bucket}/run/", said.append)
        found.folder.mkdir(parents=True, exist_ok=True)
        return found, said

    return machine


def write(workdir, **files):
    for name, text in files.items():
        file = workdir.folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def contents(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {
        name: file.read_text()
        for file in files
        if not (name := str(file.relative_to(folder))).startswith(".")
    }


def test_a_folder_of_this_host(tmp_path):
    workdir = Workdir(tmp_path / "run", print)
    assert (workdir.folder, workdir.address) == (tmp_path / "run", "")
    workdir.fetch()
    workdir.update()
    assert not workdir.folder.exists()


@pytest.mark.parametrize("given", ["gs://", "gs://bucket", "gs://bucket/../../etc"])
def test_addresses_that_cannot_be(given):
    with pytest.raises(UserError, match="write an address like gs://bucket/folder"):
        Workdir(given, print)


def test_another_machine_has_the_same(machine, bucket):
    here, said = machine("here")
    here.fetch()  # leaves an empty list: this host may write there
    assert json.loads((bucket / "run" / LIST).read_text())["files"] == {}
    write(here, log="1", checkpoints__5__state="five", reference__x="large")
    write(here, **{".lock": "1", "export__lora.writing": "h"})
    here.update()
    assert said == [f"{bucket}/run: copying 2 files, 0.0 MB: done"]
    here.update()
    assert len(said) == 1  # nothing has changed
    write(here, log="1 2", checkpoints__10__state="ten")
    (here.folder / "checkpoints/5/state").unlink()
    here.update()
    assert said[-1] == f"{bucket}/run: copying 2 files, 0.0 MB: done"

    there, said = machine("there")
    there.fetch()
    assert contents(there.folder) == {"log": "1 2", "checkpoints/10/state": "ten"}
    assert sorted(x.name for x in (bucket / "run").iterdir()) == ["checkpoints", "log", LIST]
    assert [x.name for x in (bucket / "run/checkpoints").iterdir()] == ["10"]
    there.fetch()
    there.update()
    assert len(said) == 1


def test_what_is_lost_here_is_fetched_again(machine):
    here, said = machine("here")
    write(here, log="1", checkpoints__5__state="five")
    here.update()
    (here.folder / "checkpoints/5/state").unlink()
    here.fetch()
    assert contents(here.folder) == {"log": "1", "checkpoints/5/state": "five"}
    count = len(said)
    here.update()
    assert len(said) == count


def test_what_is_gone_from_the_bucket_is_made_again(machine, bucket):
    here, _ = machine("here")
    write(here, log="1", cache__card="c", cache__shard="s", checkpoints__5__state="five")
    here.update()
    (bucket / "run/cache/shard").unlink()
    there, said = machine("there")
    there.fetch()
    assert contents(there.folder) == {"log": "1", "checkpoints/5/state": "five"}
    assert any("cache/shard is gone: what it was a part of is made again" in x for x in said)
    write(there, cache__card="c2", cache__shard="s2")
    there.update()
    here.fetch()
    assert contents(here.folder)["cache/shard"] == "s2"


def test_of_a_pair_set_nothing_is_left_either(machine, bucket):
    here, _ = machine("here")
    write(here, log="1", pairs__card="c", pairs__set__1="one", pairs__set__2="two")
    here.update()
    (bucket / "run/pairs/set/1").unlink()
    there, _ = machine("there")
    there.fetch()
    assert contents(there.folder) == {"log": "1"}


def test_what_is_deleted_there_is_copied_again_by_who_has_it(machine, bucket):
    here, _ = machine("here")
    write(here, log="1", cache__card="c", cache__shard="s")
    here.update()
    for name in ("card", "shard"):
        (bucket / "run/cache" / name).unlink()
    here.fetch()
    here.update()
    assert (bucket / "run/cache/shard").read_text() == "s"
    there, _ = machine("there")
    there.fetch()
    assert contents(there.folder) == contents(here.folder)


def test_a_folder_that_is_deleted_while_a_run_goes_on(machine, bucket):
    here, _ = machine("here")
    write(here, log="1")
    here.update()
    (bucket / "run" / LIST).unlink()
    write(here, log="1 2")
    with pytest.raises(UserError, match=f"{LIST} is gone, as if somebody deleted that folder"):
        here.update()


def test_a_cache_is_never_half_of_another(machine, bucket, monkeypatch):
    here, _ = machine("here")
    write(here, log="1", cache__a="old", cache__b="old")
    here.update()
    write(here, cache__a="new", cache__b="new")
    upload = here._upload

    def vanish(name, copied):
        upload(name, copied)
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(here, "_upload", vanish)
        with pytest.raises(Killed):
            here.update()
    there, _ = machine("there")
    there.fetch()
    assert contents(there.folder) == {"log": "1"}


def test_every_byte_arrives(machine, bucket):
    here, _ = machine("here")
    endings = (0, 9, 10, 13, 32, 127, 255)
    for i in endings:
        (here.folder / f"{i}").write_bytes(bytes([65, i]))
    here.update()
    assert all((bucket / "run" / f"{i}").read_bytes() == bytes([65, i]) for i in endings)


def test_what_belongs_to_another_history_goes(machine):
    here, _ = machine("here")
    write(here, log="1", checkpoints__5__state="five")
    here.update()
    there, _ = machine("there")
    there.fetch()
    write(there, checkpoints__7__state="seven")
    there.update()
    write(here, checkpoints__9__state="nine")  # which never reached the bucket
    here, _ = machine("here")
    here.fetch()
    assert [x.name for x in sorted((here.folder / "checkpoints").iterdir())] == ["5", "7"]
    write(here, log="1 2")
    here.update()


def test_an_upload_goes_on_though_another_failed(machine, bucket, monkeypatch):
    """Half of a file would look like one."""
    here, _ = machine("here")
    monkeypatch.setattr(remote, "_BLOCK", 4)
    write(here, long="a long text, of many parts", bad="x")
    opened, upload = threading.Event(), here._upload

    def slow(name, copied):
        if name == "bad":
            opened.wait(timeout=10)
            raise UserError("it cannot be reached")

        def told(count):
            opened.set()
            time.sleep(0.01)
            copied(count)

        return upload(name, told)

    with monkeypatch.context() as context:
        context.setattr(here, "_upload", slow)
        with pytest.raises(UserError, match="it cannot be reached"):
            here.update()
    assert (bucket / "run" / "long").read_text() == "a long text, of many parts"


def test_two_runs_at_once(machine):
    here, _ = machine("here")
    here.fetch()
    there, _ = machine("there")
    there.fetch()
    write(there, log="theirs")
    there.update()
    write(here, log="mine")
    with pytest.raises(UserError, match="another run has written there meanwhile: stop one of"):
        here.update(must=False)


def test_emptied_it_begins_anew(machine, bucket):
    here, _ = machine("here")
    write(here, log="1", checkpoints__5__state="five")
    here.update()
    (bucket / "run" / LIST).unlink()
    here.fetch()
    assert contents(here.folder) == {}
    assert not (here.folder / "checkpoints").exists()


def test_a_machine_that_vanishes_while_it_copies(machine, monkeypatch):
    here, _ = machine("here")
    write(here, log="1", checkpoints__5__state="five")
    here.update()
    write(here, log="1 2", checkpoints__10__state="ten")

    def vanish(size):
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(mirror.secrets, "token_hex", vanish)  # the list is still to be written
        with pytest.raises(Killed):
            here.update()
    there, _ = machine("there")
    there.fetch()
    assert contents(there.folder) == {"log": "1 2", "checkpoints/5/state": "five"}


def test_a_checkpoint_that_is_another(machine, bucket):
    here, _ = machine("here")
    write(here, checkpoints__5__state="five")
    here.update()
    (bucket / "run/checkpoints/5/state").write_text("5")
    there, _ = machine("there")
    with pytest.raises(UserError, match=r"checkpoints/5/state is damaged: .* to train anew"):
        there.fetch()


def test_a_part_of_a_checkpoint_that_is_gone(machine, bucket):
    here, _ = machine("here")
    write(here, checkpoints__5__state="five", checkpoints__5__metadata="{}")
    here.update()
    (bucket / "run/checkpoints/5/state").unlink()
    there, _ = machine("there")
    with pytest.raises(UserError, match=r"5/state is gone, a part of .* to train anew"):
        there.fetch()


def test_checkpoints_that_are_deleted_there_begin_anew(machine, bucket):
    here, said = machine("here")
    write(here, log="1", checkpoints__5__state="five", hate__health__step_5="h", cache__card="c")
    here.update()
    (bucket / "run/checkpoints/5/state").unlink()
    write(here, checkpoints__6__state="not copied yet")
    here.fetch()
    assert said[-1] == f"{bucket}/run/checkpoints was deleted, and begins anew"
    assert not (here.folder / "checkpoints").exists()
    left = {"log": "1", "hate/health/step_5": "h", "cache/card": "c"}
    assert contents(here.folder) == left
    there, _ = machine("there")
    there.fetch()
    assert contents(there.folder) == left


def test_errors_name_the_address(machine, bucket):
    here, _ = machine("here")
    with pytest.raises(UserError, match=f"^delete {bucket}/run/checkpoints$"), here.named():
        raise UserError(f"delete {here.folder}/checkpoints")


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"files": {"../x": {}}})])
def test_a_list_that_is_none(machine, bucket, text):
    (bucket / "run" / LIST).write_text(text)
    here, _ = machine("here")
    with pytest.raises(UserError, match=r"mirror.json is no list of this program \(.*\): delete"):
        here.fetch()


def test_a_bucket_that_cannot_be_reached(machine, monkeypatch):
    here, said = machine("here")
    here.fetch()
    write(here, log="1")

    class Unreachable:
        def __init__(self, path):
            pass

        def __truediv__(self, name):
            return self

        def exists(self):
            raise OSError("no route to host")

    with monkeypatch.context() as context:
        context.setattr(mirror.epath, "Path", Unreachable)
        here.update(must=False)
        assert "cannot be reached (no route to host)" in said[-1]
        assert said[-1].endswith("it is tried again at the next checkpoint")
        with pytest.raises(UserError, match="cannot be reached"):
            here.update()
    here.update()
    assert "copying 1 files" in said[-1]
