r"""Computes what training reads of a pair set, latents and text embeddings, and stops: no training.

    python launch/cache.py --config configs/hate.py:sd15 --config.pairs.path=pairs/hate \
        --workdir runs/hate_sd15
    python launch/cache.py ... --part 0/4  # on the first of four hosts that share the workdir
    python launch/cache.py ... --part auto  # a part for each process of a pod or of Slurm's job
    safetydpo cache --config hate:sd15 ...  # from the installed package

launch/train.py with the same options finds the cache in the workdir, and makes it if it is not
there. Parts need not start together; whichever ends last makes the cache of all. A killed one goes
on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import pop_option, read_command_line
from safetydpo_jax.errors import run_main
from safetydpo_jax.host_memory import use_huge_pages


def main() -> None:
    """Reads the command line and computes."""
    part, argv = pop_option(sys.argv, "--part")
    config, workdir = read_command_line(argv, __doc__)
    from safetydpo_jax.train.cache import run  # here: a wrong command is told at once
    from safetydpo_jax.train.workdir import part_of

    run(config, workdir, part_of(part))


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
