import errno
import subprocess
import sys

import jax
import pytest

from safetydpo_jax.errors import UserError, first_line, one_line, run_main

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes."


def run(action) -> int | None:
    with pytest.raises(SystemExit) as exit_info:
        run_main(action)
    return exit_info.value.code


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("rank is 0"), "rank is 0"),
        (FileNotFoundError("no a.csv"), "no a.csv"),
        (OSError(errno.ENOSPC, "No space left", "a.csv"), "could not write a.csv (No space left):"),
        (OSError(errno.EACCES, "no", "a.csv"), "a.csv: no: choose another place, or let this user"),
        (OSError(errno.EACCES, "no"), None),  # of something that is no file
        (jax.errors.JaxRuntimeError(FULL), f"{FULL}: the device's memory is full. Take less at a"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: message larger than the limit"), None),
        (RuntimeError(FULL), None),
        (RuntimeError("x"), None),
    ],
)
def test_what_is_told_in_one_line(error, line):
    said = one_line(error)
    assert said == line or said.startswith(line)


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("a\nb"), "a"), (ValueError(" \n"), "ValueError")]
)
def test_the_first_line(error, line):
    assert first_line(error) == line


def test_main_ends_with_its_own_exit_code():
    assert run(lambda: None) is None
    assert run(lambda: 3) == 3


@pytest.mark.parametrize("error", [UserError("rank is 0"), FileNotFoundError("no file a.csv")])
def test_a_users_error_is_one_line_and_exit_code_2(error, capsys):
    assert run(raises(error)) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_full_disk_is_told(capsys):
    assert run(raises(OSError(errno.ENOSPC, "No space left on device", "runs/a.png"))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: could not write runs/a.png (No space left on device): free some")
    with pytest.raises(PermissionError):
        run_main(raises(PermissionError(errno.EACCES, "Permission denied")))


def test_ctrl_c_exits_with_130(capsys):
    assert run(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_importing_the_package_is_light():
    code = "import sys, safetydpo_jax; print('jax' in sys.modules, safetydpo_jax.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("False ")
