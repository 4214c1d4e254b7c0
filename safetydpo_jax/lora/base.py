"""The shapes of the UNet that a LoRA is for: a checkpoint's, or of the known one that fits."""

import pathlib
from typing import Any

from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.keys import OtherBaseError
from safetydpo_jax.lora.reader import opened_lora
from safetydpo_jax.models.checkpoint import (
    open_checkpoint,
    param_shapes,
    read_json,
    resolve_checkpoint,
)
from safetydpo_jax.models.single_file import published
from safetydpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from safetydpo_jax.tensor_file import check_file

_FAMILIES = ("sd15", "sd21-base", "sdxl")  # of shapes of their own


def shapes_for(
    lora: pathlib.Path, model: str | None, configs: str = ""
) -> tuple[tuple[str, ...], Any]:
    """The base's name and the shapes of its UNet, whose weights are not read.

    Of known bases all that fit are named, and the shapes are the first one's: a LoRA without a
    layer in which they differ is of either.

    Args:
      lora: a file for it.
      model: and
      configs: as `models.pretrained.load_pipeline` takes them; None is the known base that fits.

    Raises:
      UserError, MissingFileError: there is no such file or model, or none that fits.
    """
    check_file(lora)  # before a model is fetched; and what is no such file fits none
    if model is None:
        if configs:
            raise UserError(f"{configs} is said of a model, but there is none: give it as --model")
        return _guessed(lora)
    return (model,), open_checkpoint(model, configs=configs).shapes["unet"]


def unet_shapes(folder: pathlib.Path) -> Any:
    """Of the UNet of a folder in the diffusers layout, by its config alone."""
    config = UNetConfig.from_dict(read_json(folder / "unet" / "config.json"), str(folder))
    return param_shapes({"unet": UNet2DConditionModel(config)})["unet"]


def _guessed(lora: pathlib.Path) -> tuple[tuple[str, ...], Any]:
    """The known bases that a LoRA fits, and the first one's shapes.

    Raises:
      UserError: it is of a kind that is not read, or fits none of the bases; the error is then the
        last one's.
    """
    folders = {"emoji": resolve_checkpoint("emoji"), **{x: published(x) for x in _FAMILIES}}
    said: OtherBaseError | None = None
    fitting = {}
    for name, folder in folders.items():
        shapes = unet_shapes(folder)
        try:
            with opened_lora(lora, shapes) as file:
                for layer in file.ranks:
                    file.check(layer)
        except OtherBaseError as error:
            said = error
            continue
        fitting[name] = shapes
    if fitting:
        return tuple(fitting), next(iter(fitting.values()))
    raise UserError(
        f"{said}. It was held against {', '.join(folders)}; of another base, give it as --model"
    )
