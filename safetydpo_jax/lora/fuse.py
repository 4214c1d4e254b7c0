"""A LoRA added into the weights of its UNet, for programs that load whole models only."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.reader import load_lora
from safetydpo_jax.models.checkpoint import open_checkpoint
from safetydpo_jax.models.pretrained import WEIGHTS_FILE
from safetydpo_jax.models.state_dict import read_params, write_params
from safetydpo_jax.tensor_file import check_file

DTYPES = ("float16", "bfloat16", "float32")


def fuse(
    model: str,
    lora: pathlib.Path,
    out: pathlib.Path,
    *,
    scale: float = 1.0,
    dtype: str = "float16",
    configs: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> pathlib.Path:
    """Writes the UNet W + scale A B as a diffusers folder, one tensor in memory at a time.

    Args:
      model: the base, as `load_pipeline` takes it.
      lora: the file to add, in any format of `load_lora`.
      out: the folder to write; "unet" of a diffusers checkpoint takes it as it is.
      scale: strength of the LoRA.
      dtype: of the weights written, one of `DTYPES`; sums are made in float32.
      configs: as `load_pipeline` takes it.
      progress: takes lines of text.

    Returns:
      The weights' file.

    Raises:
      UserError, MissingFileError: of the checkpoint, the LoRA or the disk; a folder with weights.
    """
    if dtype not in DTYPES:
        raise UserError(f"the type is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    if out.is_dir() and (found := [x.name for x in out.iterdir() if x.suffix == ".safetensors"]):
        # A reader may well take those, whatever is put beside them.
        raise UserError(f"{out} holds weights, {found[0]}: give another folder, or remove them")
    file = out / WEIGHTS_FILE
    check_file(lora)  # before a model is fetched
    base = open_checkpoint(model, configs=configs)
    shapes = base.shapes["unet"]
    adapters, _ = load_lora(lora, shapes)
    deltas: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    layers = {path[:-1] for path in deltas}

    def fused() -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        for path, value in read_params(
            base.weights("unet"),
            shapes,
            name="unet",
            table=base.tables.get("unet"),
            progress=progress,
        ):
            if path[-1] == "kernel" and path[:-1] in layers:
                a, b = (np.asarray(deltas[(*path[:-1], leaf)], np.float32) for leaf in "ab")
                # (in, r) or (kh, kw, in, r), times (r, out): PyTorch has the outputs first.
                delta = (a @ (scale * b)).transpose((1, 0) if a.ndim == 2 else (3, 2, 0, 1))
                value = value.astype(np.float32) + delta
            yield path, value

    config = (base.folders["unet"] / "config.json").read_bytes()
    with storage.explained_writes(out):
        out.mkdir(parents=True, exist_ok=True)
        storage.write_file(out / "config.json", config)
    write_params(fused(), shapes, file, jnp.dtype(dtype))
    progress(f"{file}: {file.stat().st_size / 1e9:.2f} GB, {len(layers)} layers changed")
    return file
