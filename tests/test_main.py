"""The console command; `python -m safetydpo_jax` is the same program."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safetydpo_jax import __version__
from safetydpo_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "safetydpo_jax"]


def run(folder, *arguments, program=PROGRAM, path=""):
    """The program from `folder`, with `path` before this repository on sys.path."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}" if path else str(ROOT)}
    return subprocess.run(
        [*program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands_without_importing_jax(tmp_path, arguments):
    check = (
        "import atexit, sys; from safetydpo_jax.__main__ import main;"
        "atexit.register(lambda: print('jax' in sys.modules)); main()"
    )
    done = run(tmp_path, *arguments, program=[sys.executable, "-c", check])
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        script = ast.parse((ROOT / "launch" / f"{name}.py").read_text())
        (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert line.endswith("  " + ast.get_docstring(script).splitlines()[0])
    assert done.stdout.endswith("False\n")


def test_version(tmp_path):
    assert run(tmp_path, "--version").stdout == f"safetydpo {__version__}\n"


@pytest.mark.parametrize("name", ["trian", "build_artwork", "../launch/train", "--bogus", ""])
def test_an_unknown_command(tmp_path, name):
    done = run(tmp_path, name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: safetydpo has no command {name!r}; there are {', '.join(COMMANDS)}\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_shows_both_ways_to_call_it(tmp_path, name):
    done = run(tmp_path, name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python launch/{name}.py --" in done.stdout
    assert f"safetydpo {name} " in done.stdout


def test_a_commands_errors_are_told_in_its_name(tmp_path):
    done = run(tmp_path, "train", "--config", "hate", "--config.stepz=3")
    assert done.returncode == 2
    assert done.stderr == "error: the config has no key 'stepz'; did you mean 'steps'?\n"
    done = run(tmp_path, "sample")
    assert done.returncode == 2
    assert "safetydpo sample: error: the following arguments are required" in done.stderr


def test_a_config_of_ones_own_imports_ours(tmp_path):
    """Even where another package of that name is installed."""
    other = tmp_path / "other" / "configs"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    mine = (
        "from configs import common\n\n\ndef get_config():\n    return common.get_config('hate')\n"
    )
    (tmp_path / "mine.py").write_text(mine)
    done = run(tmp_path, "train", "--config", "mine.py", "--config.stepz=3", path=other.parent)
    assert "did you mean 'steps'?" in done.stderr
