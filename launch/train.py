"""Trains a safety expert: pairs, cache, DPO training, export, report.

    python launch/train.py --config configs/hate.py
    python launch/train.py --config configs/hate.py --config.steps=800 --workdir runs/longer
    safetydpo train --config hate  # the first, from the installed package

Every value of the config can be set as --config.KEY=VALUE. The same command goes on after a kill.
"""

import sys
from pathlib import Path

# For `configs`, and for the package if it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import read_command_line, shown_command
from safetydpo_jax.errors import run_main
from safetydpo_jax.host_memory import use_huge_pages


def main() -> None:
    """Reads the command line and runs."""
    config, workdir = read_command_line(sys.argv, __doc__)
    command = shown_command("safetydpo train", sys.argv[1:])
    from safetydpo_jax.train.loop import run  # here, so that a wrong command is told at once

    run(config, workdir, command=command)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
