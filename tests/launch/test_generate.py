import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "generate.py"


def run(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "--config configs/own.py --config.harm=examples/gambling.yaml" in done.stdout


def test_errors_are_one_line(tmp_path):
    done = run(tmp_path, "--config=configs/own.py")
    assert done.returncode == 2
    assert done.stderr == (
        "error: set --config.harm=FILE to a harm, as in --config.harm=examples/gambling.yaml; for "
        "pairs that are there --config.pairs.path, and --config.category to their category\n"
    )
    assert not (tmp_path / "runs").exists()
