"""Compiled programs, where they are kept, and their tracing."""

import gc
import os

import jax
import pytest

from safetydpo_jax import compilation
from safetydpo_jax.compilation import keep_compiled, tracing
from safetydpo_jax.remote import CACHE_DIR

DIR, SIZE = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
OF_XLA = "jax_persistent_cache_enable_xla_caches"


@pytest.fixture
def none_given(monkeypatch, tmp_path):
    """As if nothing said where programs are kept; what is set is undone."""
    before = {name: getattr(jax.config, name) for name in (DIR, SIZE, OF_XLA)}
    monkeypatch.setenv(CACHE_DIR, str(tmp_path))
    jax.config.update(DIR, None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_with_what_this_user_keeps(none_given, tmp_path):
    keep_compiled()
    folder = tmp_path / "compiled"
    assert getattr(jax.config, DIR) == f"{folder}/{compilation._processor()}"
    assert getattr(jax.config, SIZE) == compilation.MOST_BYTES
    assert getattr(jax.config, OF_XLA) != "none"


def test_what_a_kill_left_half_written_is_removed(none_given, tmp_path):
    folder = tmp_path / "compiled" / compilation._processor()
    folder.mkdir(parents=True)
    names = ["whole-cache", "whole-atime", "half-cache", "being_written-cache", "other"]
    for name in names:
        (folder / name).write_bytes(b"x")
        if name != "being_written-cache":
            os.utime(folder / name, (0, 0))
    keep_compiled()
    assert {path.name for path in folder.iterdir()} == {*names} - {"half-cache"}


def test_a_folder_that_may_only_be_read(none_given, tmp_path, monkeypatch):
    folder = tmp_path / "compiled" / compilation._processor()
    folder.mkdir(parents=True)
    (folder / "half-cache").write_bytes(b"x")
    os.utime(folder / "half-cache", (0, 0))

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(compilation.Path, "unlink", refuse)
    keep_compiled()
    assert getattr(jax.config, DIR) == str(folder)


def test_of_a_job_where_all_its_processes_see_them(none_given):
    keep_compiled("gs://bucket/run/compiled")
    assert getattr(jax.config, DIR).startswith("gs://bucket/run/compiled/")
    assert getattr(jax.config, SIZE) == -1  # no lock
    assert getattr(jax.config, OF_XLA) == "none"


def test_or_where_the_user_says(none_given, tmp_path):
    jax.config.update(DIR, str(tmp_path / "mine"))
    keep_compiled("gs://bucket/run/compiled")
    assert getattr(jax.config, DIR) == str(tmp_path / "mine")


def test_what_was_there_is_set_aside_while_a_program_is_traced():
    with tracing():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_also_by_one_that_cannot_be_traced():
    with pytest.raises(ZeroDivisionError), tracing():
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0
