"""The command `export`: a LoRA in another format, or in the weights of its UNet."""

import pathlib
from collections.abc import Callable

from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import describe, scaled
from safetydpo_jax.lora.base import shapes_for
from safetydpo_jax.lora.fuse import OF_BYTES, fuse, fuse_file
from safetydpo_jax.lora.reader import load_lora
from safetydpo_jax.lora.writer import kohya_base, save_kohya, save_lora, save_peft

_WRITERS = {"diffusers": save_lora, "kohya": save_kohya, "peft": save_peft}
# What others said of their file's ranks, which is not so once alpha / rank is within the factors.
_OF_RANKS = ("ss_network_dim", "ss_network_alpha")


def export(
    lora: pathlib.Path,
    form: str,
    out: pathlib.Path,
    *,
    model: str | None = None,
    configs: str = "",
    scale: float = 1.0,
    dtype: str | None = None,
    progress: Callable[[str], None] = print,
) -> pathlib.Path:
    """Writes what a LoRA file holds for the UNet.

    Args:
      lora: the file, in any format of `load_lora`.
      form: "diffusers", "kohya", "peft" or "fused".
      out: the file to write; of peft's and the fused form the folder, or, of a base that is one
        file, a file like it.
      model: the base, as `load_pipeline` takes it; the fused form's weights. None takes the shapes
        of the known base that fits.
      configs: as `load_pipeline` takes it.
      scale: strength of the LoRA, within what is written.
      dtype: of fused weights in a folder, one of `fuse.DTYPES`; None is float16. In one file each
        keeps its own.
      progress: takes lines of text.

    Returns:
      The file with the weights.

    Raises:
      UserError, MissingFileError: of the LoRA, the base or the disk.
    """
    if form == "fused":
        if model is None:
            raise UserError("the fused form is made of a model's weights: give the model")
        if out.suffix == ".safetensors":
            if dtype is not None:
                raise UserError("--dtype is of a folder: in one file each weight keeps its type")
            return fuse_file(model, lora, out, scale=scale, configs=configs, progress=progress)
        dtype = dtype or "float16"
        return fuse(model, lora, out, scale=scale, dtype=dtype, configs=configs, progress=progress)
    if form not in _WRITERS:
        raise UserError(f"the format is {form!r}: it must be one of {', '.join(_WRITERS)}, fused")
    if form != "peft" and out.suffix != ".safetensors":
        raise UserError(f"--out is {out}: its name must end in .safetensors")
    names, shapes = shapes_for(lora, model, configs)
    adapters, header = load_lora(lora, shapes)
    header = {key: text for key, text in header.items() if key not in _OF_RANKS + OF_BYTES}
    if scale != 1:
        header["export_scale"] = str(scale)  # that of its making stays as it was
    known = len(names) == 1
    base = {"base": kohya_base(shapes) if known else None} if form == "kohya" else {}
    file = _WRITERS[form](out, scaled(adapters, scale, 1), header, **base)
    progress(
        f"{file}: {form}, {describe(adapters)} of {' or '.join(names)}"
        + ("" if known or form != "kohya" else "; to name its base in the file, give --model")
    )
    return file
