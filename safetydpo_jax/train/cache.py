"""A cache and no more: the phases of a run that one process, or each of several, can do before."""

import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from safetydpo_jax import data
from safetydpo_jax.models.pipeline import TOKENIZERS
from safetydpo_jax.train.base import load_on_all_devices
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.workdir import Phases


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[str], None] = lambda line: print(line, flush=True),
) -> data.Cache | None:
    """Encodes a part of the pairs of a config, or what is left of it.

    Args:
      config: as `configs/common.py` makes it.
      workdir: the run's folder; the parts' common one.
      part: as `data.encode_part` takes it.
      progress: takes lines of text.

    Returns:
      The cache, or None while other parts are missing.

    Raises:
      UserError: a wrong config, no pairs or another category's, or what `data.encode_part` raises.
    """
    phases = Phases(progress, total=3)

    phases.begin("config and pairs")
    config = resolve(config)
    folder = config.pairs.path or pathlib.Path(workdir) / "pairs"
    pairs = data.open_pairs(folder)
    data.check_pairs(config, pairs)
    progress(f"{config.category}, {folder}: {pairs.num_pairs} pairs, {pairs.num_preserve} others")

    phases.begin("autoencoder and text encoders")
    pipeline = load_on_all_devices(config, progress, parts=("vae", *TOKENIZERS))

    phases.begin("cache")
    cache = data.encode_part(config, pipeline, workdir, progress, part)
    phases.end()
    if cache:
        progress(
            f"cache         {cache.folder}: {2 * cache.num_pairs + cache.num_preserve} pictures\n"
            f"to train      safetydpo train with the same options"
        )
    progress(phases.table())
    return cache
