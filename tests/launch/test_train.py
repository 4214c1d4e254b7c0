import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"


def test_the_script_says_errors_in_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--config=configs/hate.py", "--config.stepz=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the config has no key 'stepz'; did you mean 'steps'?\n"


def test_help_comes_at_once(tmp_path):
    """Without importing JAX, which takes seconds."""
    check = (
        "import atexit, runpy, sys; atexit.register(lambda: print('jax' in sys.modules));"
        f"sys.argv = ['train.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--config configs/hate.py" in done.stdout
    assert done.stdout.endswith("False\n")
