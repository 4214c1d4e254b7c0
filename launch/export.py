r"""Writes a LoRA in another format, or adds it into the weights of its UNet.

    python launch/export.py --lora merged.safetensors --format kohya --out kohya.safetensors
    python launch/export.py --lora FILE --format fused --model FOLDER --out fused/unet
    python launch/export.py --lora FILE --format fused --model ANY.safetensors --out OUT.safetensors
    safetydpo export ...  # from the installed package

Formats: `diffusers` and `kohya` (ComfyUI, A1111) are files, `peft` is a folder with
adapter_config.json, and `fused` has the LoRA in the model's weights, for programs that load whole
models only: a diffusers `unet/` folder, or, of a model in one file, a file like it (ComfyUI,
A1111). It is written one tensor at a time, so memory does not grow with the model. Any of the first
three can be read, and so can older forms.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import local_path
from safetydpo_jax.errors import run_main

FORMATS = ("diffusers", "kohya", "peft", "fused")


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and exports.

    Raises:
      UserError: an input that is wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", type=Path, required=True, metavar="FILE", help="what to export")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="PATH", help="file or folder"
    )
    parser.add_argument(
        "--model", help="its base, as launch/sample.py takes it; `fused` needs it, for the others "
        "the known base that fits is taken"
    )  # fmt: skip
    parser.add_argument("--model_config", default="", help="what such a file is")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA (1)")
    parser.add_argument("--dtype", help="of a fused folder: float16 (default), bfloat16, float32")
    arguments = parser.parse_args(argv)
    if arguments.format == "fused" and arguments.model is None:
        parser.error("--format fused adds the LoRA into a model's weights: give --model")
    if arguments.format != "fused" and arguments.dtype is not None:
        parser.error(f"--dtype is of fused weights: {arguments.format} has float32")
    from safetydpo_jax.lora.export import export  # here, so that a wrong command is told at once

    export(
        arguments.lora,
        arguments.format,
        arguments.out,
        model=arguments.model,
        configs=arguments.model_config,
        scale=arguments.scale,
        dtype=arguments.dtype,
        progress=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    run_main(main)
