"""A cache and no more: the phases of a run that one process, or each of several, can do before."""

import pathlib
import re
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from safetydpo_jax import data
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.pipeline import TOKENIZERS
from safetydpo_jax.models.pretrained import load_pipeline
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
      UserError: a wrong config, no pairs, or what `data.encode_part` raises.
    """
    phases = Phases(progress, total=3)

    phases.begin("config and pairs")
    config = resolve(config)
    folder = pathlib.Path(config.pairs.path or pathlib.Path(workdir) / "pairs")
    pairs = data.open_pairs(folder)
    progress(f"{config.category}, {folder}: {pairs.num_pairs} pairs, {pairs.num_preserve} others")

    phases.begin("autoencoder and text encoders")
    pipeline = load_pipeline(
        config.model,
        dtype=config.dtype,
        vae=config.vae,
        configs=config.model_config,
        parts=("vae", *TOKENIZERS),
        progress=progress,
    )

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


def part_of(text: str) -> tuple[int, int]:
    """What `--part` says: "I/N", "auto", or "", which is all.

    "auto" asks JAX which process this is of how many (TPU pods, Slurm, Open MPI, Kubernetes).

    Raises:
      UserError: it is none of these, or JAX does not know.
    """
    if not text:
        return 0, 1
    if text == "auto":
        try:
            jax.distributed.initialize()
            found = jax.process_index(), jax.process_count()
            jax.distributed.shutdown()  # which waits for all: parts are to end on their own
            return found
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--part auto: JAX does not know which process of a job this is ({error}): give "
                "--part I/N"
            ) from error
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)):
        raise UserError(f"--part is {text!r}: write it as 0/4, the first of four, or auto")
    return int(match[1]), int(match[2])
