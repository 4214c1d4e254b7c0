"""A LoRA added into the weights of its UNet, for programs that load whole models only.

As a diffusers folder, or, of a checkpoint in one file, as a file like it.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.reader import load_lora
from safetydpo_jax.models.checkpoint import open_checkpoint
from safetydpo_jax.models.pretrained import WEIGHTS_FILE
from safetydpo_jax.models.state_dict import read_params, torch_key, torch_shape, write_params
from safetydpo_jax.tensor_file import check_file, opened, write_changed

DTYPES = ("float16", "bfloat16", "float32")
# What a file's header says of its bytes, by which A1111 knows it.
OF_BYTES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


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
    pairs: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    layers = {path[:-1] for path in pairs}

    def fused() -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        for path, value in read_params(
            base.weights("unet"),
            shapes,
            name="unet",
            table=base.tables.get("unet"),
            progress=progress,
        ):
            if path[-1] == "kernel" and path[:-1] in layers:
                value = value.astype(np.float32) + _delta(pairs, path[:-1], scale)
            yield path, value

    config = (base.folders["unet"] / "config.json").read_bytes()
    with storage.explained_writes(out):
        out.mkdir(parents=True, exist_ok=True)
        storage.write_file(out / "config.json", config)
    write_params(fused(), shapes, file, jnp.dtype(dtype))
    progress(f"{file}: {file.stat().st_size / 1e9:.2f} GB, {len(layers)} layers changed")
    return file


def fuse_file(
    model: str,
    lora: pathlib.Path,
    out: pathlib.Path,
    *,
    scale: float = 1.0,
    configs: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> pathlib.Path:
    """Writes a checkpoint in one file with W + scale A B in its UNet, as the base is one.

    What the LoRA does not change is copied byte by byte, text encoders and autoencoder too; what it
    changes keeps its type.

    Args:
      model: the base, a .safetensors file in the original layout.
      lora: the file to add, in any format of `load_lora`.
      out: the file to write.
      scale: strength of the LoRA.
      configs: as `load_pipeline` takes it.
      progress: takes lines of text.

    Returns:
      `out`.

    Raises:
      UserError, MissingFileError: of the checkpoint, the LoRA or the disk; a base that is a folder
        or would be overwritten.
    """
    check_file(lora)
    if pathlib.PurePath(model).suffix != ".safetensors":  # before a model is fetched
        raise UserError(
            f"{model} is not one file, as {out} would be: give a folder as --out, or a model that "
            "is a .safetensors file"
        )
    base = open_checkpoint(model, configs=configs)
    if out.resolve() in (base.place.resolve(), lora.resolve()):
        raise UserError(f"{out} is read here, and would be lost: give another name")
    shapes = base.shapes["unet"]
    adapters, _ = load_lora(lora, shapes)
    pairs: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(dict(shapes)))
    places = {ours: key for key, [(ours, _)] in base.tables["unet"].entries.items()}
    kernels = {
        places[torch_key(path)]: path
        for path in flat
        if path[-1] == "kernel" and (*path[:-1], "a") in pairs
    }
    with opened(base.place) as tensors:
        keys, about = set(tensors.keys()), tensors.metadata()
        for key, path in kernels.items():
            wanted = torch_shape(path, flat[path].shape)
            if key not in keys or tensors.shape(key) != wanted:
                found = f"has {tensors.shape(key)}" if key in keys else "is missing"
                raise UserError(f"{base.place}: '{key}' {found}, where {wanted} is to be changed")
            if not tensors.can_change(key):
                raise UserError(
                    f"{base.place}: '{key}' is of a type that is not changed here, such as 8 bits; "
                    "take the file in float16, bfloat16 or float32"
                )

        def fused() -> Iterator[tuple[str, np.ndarray]]:
            for key, path in kernels.items():
                value = tensors.read(key).astype(np.float32)
                if not np.isfinite(value).all():
                    raise UserError(
                        f"{base.place}: '{key}' holds NaN or infinity; the checkpoint is damaged"
                    )
                yield key, value + _delta(pairs, path[:-1], scale)

        about = {key: text for key, text in about.items() if key not in OF_BYTES}
        about |= {"fused_lora": lora.name, "fused_lora_sha256": storage.hash_file(lora)}
        write_changed(
            out,
            base.place,
            fused(),
            metadata=about | {"fused_scale": str(scale)},
            remedy="lower --scale, or write a folder in a wider type",
        )
    size = out.stat().st_size / 1e9
    progress(f"{out}: {size:.2f} GB, {len(kernels)} layers changed, each in the type it had")
    if any(key.startswith("model_ema.") for key in keys):
        progress(
            f"{out}: its model_ema.* are as they were: who loads those gets the model without the "
            "LoRA"
        )
    return out


def _delta(
    pairs: Mapping[tuple[str, ...], Any], layer: tuple[str, ...], scale: float
) -> np.ndarray:
    """What an adapter adds to a layer's kernel, which PyTorch has with the outputs first."""
    a, b = (np.asarray(pairs[(*layer, leaf)], np.float32) for leaf in "ab")
    # (in, r) or (kh, kw, in, r), times (r, out).
    return (a @ (scale * b)).transpose((1, 0) if a.ndim == 2 else (3, 2, 0, 1))
