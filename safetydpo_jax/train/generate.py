"""A pair set and no more: the first phases of a run, for pairs that are asked for by name."""

import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from safetydpo_jax import data
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.workdir import Phases, lock_workdir


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    progress: Callable[[str], None] = lambda line: print(line, flush=True),
) -> pathlib.Path:
    """Draws and judges the pairs of a config, or goes on where an earlier call ended.

    Args:
      config: as `configs/common.py` makes it.
      workdir: the run's folder; made if needed, used by one run at a time.
      progress: takes lines of text.

    Returns:
      The pair set's folder, `workdir`/pairs.

    Raises:
      UserError: a wrong config or harm, no prompts for this base, or what `data.make_pairs` raises.
    """
    phases = Phases(progress, total=3)

    phases.begin("config and workdir")
    config = resolve(config, pairs_only=True)
    if config.pairs.path:
        raise UserError(
            f"config.pairs.path is {config.pairs.path}: with pairs there is nothing to make"
        )
    source = data.source_of(config)
    with lock_workdir(pathlib.Path(workdir)):
        progress(f"{config.category}, {workdir}, {source.name}")

        phases.begin("base model")
        pipeline = load_pipeline(
            config.model,
            dtype=config.dtype,
            vae=config.vae,
            configs=config.model_config,
            progress=progress,
        )
        progress(f"{config.model}, {pipeline.resolution} px")

        phases.begin("pairs")
        folder = data.make_pairs(config, pipeline, workdir, progress, source)
        phases.end()
    pairs = data.PairSet(folder)
    progress(
        f"pairs         {folder}: {pairs.num_pairs} pairs, {pairs.num_preserve} preservation "
        "pictures; card.json says how they were made\n"
        f"to train      safetydpo train with the same options and --config.pairs.path={folder}"
    )
    progress(phases.table())
    return folder
