"""A pair set and no more: the first phases of a run, for pairs that are asked for by name."""

import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from safetydpo_jax import data
from safetydpo_jax.data.draw import draw_all
from safetydpo_jax.data.pending import PendingPairs
from safetydpo_jax.train.base import check_drawable, check_sampler, load_on_all_devices
from safetydpo_jax.train.factory import check_nothing_given
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.workdir import Phases, lock_workdir


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[str], None] = lambda line: print(line, flush=True),
) -> pathlib.Path:
    """Draws and judges the pairs of a config, or goes on where an earlier call ended.

    Args:
      config: as `configs/common.py` makes it.
      workdir: the run's folder; made if needed.
      part: (i, n): this process is the i-th of n that share the folder.
      progress: takes lines of text.

    Returns:
      The pair set's folder, `workdir`/pairs.

    Raises:
      UserError: a wrong config or harm, no prompts for this base, or as `PendingPairs` and
        `draw_all`.
    """
    phases = Phases(progress, total=3)

    phases.begin("config and workdir")
    config = resolve(config, pairs_only=True)
    check_nothing_given(config)
    source = data.source_of(config)
    with lock_workdir(pathlib.Path(workdir), part):
        progress(f"{config.category}, {workdir}, {source.name}")
        if (there := source.num_prompts) is not None:
            wanted = config.pairs.num_pairs
            progress(
                f"{there} pairs of prompts, {wanted} of pictures are drawn"
                + (
                    f": {there - wanted} stay unused, unless you give --config.pairs.num_pairs="
                    f"{there}"
                    if there > wanted
                    else ""
                )
            )

        phases.begin("base model")
        pipeline = load_on_all_devices(config, progress)
        check_drawable(config, pipeline)
        check_sampler(config, pipeline.schedule)

        phases.begin("pairs")
        drawn = PendingPairs(config, pipeline, pathlib.Path(workdir) / "pairs", source)
        draw_all([drawn], pipeline, progress, part)
        folder = drawn.finish(progress)
        phases.end()
    pairs = data.PairSet(folder)
    progress(
        f"pairs         {folder}: {pairs.num_pairs} pairs, {pairs.num_preserve} preservation "
        "pictures; card.json says how they were made\n"
        f"to train      safetydpo train with the same options and --config.pairs.path={folder}"
    )
    progress(phases.table())
    return folder
