"""What one process of a job meets, all end with; jobs themselves are in tests/train."""

import errno
import json

import jax
import pytest

from safetydpo_jax import processes, remote
from safetydpo_jax.errors import UnreachableError, UserError, adding


@pytest.fixture
def first_of_two(monkeypatch):
    """This process is the first of two, and hears only itself."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "told", lambda text, process=0: text)
    monkeypatch.setattr(processes, "connect", lambda: None)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0)

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(processes.os, "_exit", end)


def fails(error):
    def what():
        raise error

    return what


@pytest.mark.parametrize("by", [processes.first, processes.each])
@pytest.mark.parametrize("kind", [UserError, UnreachableError])
def test_all_are_told_what_kind_of_error_it_was(by, kind, first_of_two):
    with pytest.raises(UserError, match=r"^no answer$") as caught:
        by(fails(kind("no answer")))
    assert caught.type is kind
    with pytest.raises(ZeroDivisionError):
        by(fails(ZeroDivisionError()))
    assert by(lambda: 3) == 3


def test_others_say_whose_error_it_is(first_of_two, monkeypatch):
    failed = json.dumps({"error": "no answer", "again": False, "host": "worker-1"})
    monkeypatch.setattr(processes, "told", lambda text, process=0: failed if process else text)
    with pytest.raises(UserError, match=r"^process 1 of 2 \(worker-1\): no answer$"):
        processes.each(lambda: 3)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("a"), 2), (UnreachableError("a"), processes.LOST), (ZeroDivisionError("a"), 1)],
)
def test_a_job_that_may_go_on_later_ends_as_one_to_be_started_again(error, code, first_of_two):
    with pytest.raises(SystemExit) as caught, processes.job():
        raise error
    assert caught.value.code == code


class CredentialsError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("x"), UnreachableError),
        (TimeoutError("x"), UnreachableError),
        (Exception("503"), UnreachableError),
        (PermissionError(errno.EACCES, "x"), UserError),
        (ValueError("Protocol not known: x"), UserError),
        (CredentialsError("x"), UserError),
        (OSError("Forbidden: https://storage"), UserError),
    ],
)
def test_what_a_bucket_may_answer_next_time(error, kind):
    with (
        pytest.raises(UserError, match=r"gs://b cannot be reached .*; more$") as caught,
        adding("; more"),
        remote.explained("gs://b"),
    ):
        raise error
    assert caught.type is kind
