r"""Adds a LoRA into the weights of its UNet, for programs that load whole models only.

    python launch/fuse.py --model FOLDER --lora runs/hate/export/pytorch_lora_weights.safetensors \
        --out fused/unet
    safetydpo fuse --model FOLDER --lora FILE --out fused/unet  # from the installed package

It writes a diffusers folder with config.json and diffusion_pytorch_model.safetensors, one tensor at
a time, so memory does not grow with the model.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import add_model_arguments
from safetydpo_jax.errors import run_main


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and fuses.

    Raises:
      UserError: an input that is wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--lora", type=Path, required=True, metavar="FILE", help="what to add")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA (1)")
    parser.add_argument("--dtype", default="float16", help="float16, bfloat16 or float32 (float16)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    arguments = parser.parse_args(argv)
    from safetydpo_jax.lora.fuse import fuse  # here, so that a wrong command is told at once

    fuse(
        arguments.model,
        arguments.lora,
        arguments.out,
        scale=arguments.scale,
        dtype=arguments.dtype,
        configs=arguments.model_config,
        progress=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    run_main(main)
