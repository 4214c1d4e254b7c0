"""The base model of a config."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from safetydpo_jax.models.pretrained import load_pipeline


def load_base(config: ConfigDict, progress: Callable[[str], None], **options: Any) -> Any:
    """Loads it, a `models.pipeline.Pipeline`.

    Args:
      config: from `settings.resolve`.
      progress: takes lines of text while large files are read.
      **options: others of `load_pipeline`.

    Raises:
      UserError: as `load_pipeline`.
    """
    return load_pipeline(
        config.model,
        dtype=config.dtype,
        vae=config.vae,
        configs=config.model_config,
        progress=progress,
        **options,
    )


def load_on_all_devices(config: ConfigDict, progress: Callable[[str], None], **options: Any) -> Any:
    """The same on each device of this host, which share batches: to draw and to encode."""
    pipeline = load_base(config, progress, **options).spread(jax.local_devices())
    devices = f"{pipeline.num_devices} x {jax.local_devices()[0].device_kind}"
    progress(f"{config.model}, {pipeline.resolution} px, {devices}")
    return pipeline
