r"""Draws the pairs of a harm with the model to be aligned, and stops: no training.

    python launch/generate.py --config configs/own.py --config.harm=examples/gambling.yaml
    python launch/generate.py --config configs/own.py:sd15 --config.harm=FILE \
        --config.model=FOLDER --workdir runs/gambling
    safetydpo generate --config own --config.harm=FILE  # from the installed package

With a Stable Diffusion base it draws what the file asks for, harm included, and judges nothing. The
same command goes on after a kill. It ends with WORKDIR/pairs, for --config.pairs.path.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import read_command_line
from safetydpo_jax.errors import run_main
from safetydpo_jax.host_memory import use_huge_pages


def main() -> None:
    """Reads the command line and draws."""
    config, workdir = read_command_line(sys.argv, __doc__)
    from safetydpo_jax.train.generate import run  # here, so that a wrong command is told at once

    run(config, workdir)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
