r"""Draws pairs with the model to be aligned, and stops: no training.

    python launch/generate.py --config configs/coprov2.py --workdir runs/coprov2
    python launch/generate.py --config configs/own.py --config.harm=examples/gambling.yaml
    python launch/generate.py --config configs/own.py:sd15 --config.harm=FILE \
        --config.model=FOLDER --workdir runs/gambling
    python launch/generate.py ... --part 0/4  # on the first of four hosts that share the workdir
    python launch/generate.py ... --part auto  # a part for each process of a pod or of Slurm's job
    safetydpo generate --config own --config.harm=FILE  # from the installed package

coprov2 makes pair sets of all categories, from a list of concepts on, and their caches
(docs/pairs/factory.md); own those of one harm of yours. With a Stable Diffusion base they draw what
is asked for, harm included. The same command goes on after a kill and ends with the same pairs, by
one process or by several.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import overrides, pop_option, read_command_line
from safetydpo_jax.errors import run_main
from safetydpo_jax.host_memory import use_huge_pages


def main() -> None:
    """Reads the command line and draws."""
    part, argv = pop_option(sys.argv, "--part")
    config, workdir = read_command_line(argv, __doc__)
    from safetydpo_jax.train import factory, generate  # here: a wrong command is told at once
    from safetydpo_jax.train.workdir import part_of

    if "writer" not in config:
        generate.run(config, workdir, part_of(part))
        return
    kept = overrides(argv, but=("writer", "pairs", "drawing", "report", "seed"))
    factory.run(config, workdir, part_of(part), options=shlex.join(kept))


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
