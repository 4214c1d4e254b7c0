"""The base model of a config."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from safetydpo_jax.compilation import keep_compiled
from safetydpo_jax.diffusion.samplers import SAMPLERS
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.pretrained import load_pipeline


def load_base(config: ConfigDict, progress: Callable[[str], None], **options: Any) -> Any:
    """Loads it, a `models.pipeline.Pipeline`.

    Args:
      config: from `settings.resolve`.
      progress: takes lines of text while large files are read.
      **options: others of `load_pipeline`.

    Raises:
      UserError: as `load_pipeline`, or the model is not of the config's base.
    """
    pipeline = load_pipeline(
        config.model,
        dtype=config.dtype,
        vae=config.vae,
        configs=config.model_config,
        progress=progress,
        **options,
    )
    if config.base != "emoji" and (config.base == "sdxl") != pipeline.is_sdxl:
        found, given = ("SDXL", "sdxl") if pipeline.is_sdxl else ("not SDXL", "sd15 or NAME:sd21")
        raise UserError(
            f"{config.model} is {found}, and the config is for {config.base}: give --config "
            f"NAME:{given}"
        )
    return pipeline


def check_drawable(config: ConfigDict, pipeline: Any) -> None:
    """Refuses to draw the embedded world's prompts, harm included, with a model that is another's.

    Raises:
      UserError: its pictures are of another size, which its judge does not read.
    """
    from safetydpo_jax.emoji.scenes import SIDE  # here: other bases need none of it

    if config.base == "emoji" and pipeline.resolution != SIDE:
        raise UserError(
            f"{config.model} draws {pipeline.resolution} px, and the config is for the embedded "
            f"model of {SIDE} px: give --config NAME:sd15, NAME:sd21 or NAME:sdxl"
        )


def check_sampler(config: ConfigDict, schedule: NoiseSchedule) -> None:
    """Raises UserError for a sampler or a number of steps that the base's schedule has not."""
    SAMPLERS[config.drawing.sampler](schedule, config.drawing.num_steps)


def load_on_all_devices(config: ConfigDict, progress: Callable[[str], None], **options: Any) -> Any:
    """The same on each device of this host, which share batches: to draw and to encode."""
    keep_compiled()
    pipeline = load_base(config, progress, **options).spread(jax.local_devices())
    devices = f"{pipeline.num_devices} x {jax.local_devices()[0].device_kind}"
    progress(f"{config.model}, {pipeline.resolution} px, {devices}")
    return pipeline
