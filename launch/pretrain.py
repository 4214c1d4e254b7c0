"""Trains a small base model from pictures with captions: autoencoder, text encoder, UNet.

    python launch/pretrain.py --config configs/emoji_base.py
    safetydpo pretrain --config emoji_base  # the same, from the installed package

The same command goes on after a kill. It ends with WORKDIR/pipeline, a diffusers checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import read_command_line
from safetydpo_jax.errors import run_main
from safetydpo_jax.host_memory import use_huge_pages


def main() -> None:
    """Reads the command line and runs."""
    config, workdir = read_command_line(sys.argv, __doc__)
    from safetydpo_jax.pretrain.run import run

    run(config, workdir)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
