"""The base's errors on every draw of every row, computed once: a table instead of a pass a step.

Diffusion-DPO asks of the reference two numbers a row, its squared errors on winner and loser. They
depend on the row and its draw alone (`noise`), so with a few draws a row, in turn, they can be
known before. One file a draw, in a folder named by all that the errors depend on:

    reference/0123456789abcdef/draw_00000.safetensors    errors (rows, 2), float32

Rows are in the order of their row_id. More draws go on from fewer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from safetydpo_jax import processes, sharding, storage
from safetydpo_jax.data import STRATEGIES, Cache, pair_batch
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.pace import Pace
from safetydpo_jax.tensor_file import opened, write_tensors
from safetydpo_jax.train.losses import squared_error
from safetydpo_jax.train.step import (
    Batch,
    full_precision,
    make_predict,
    noise_seed,
    noisy_pairs,
)


def reference_table(
    config: ConfigDict,
    pipeline: Any,
    cache: Cache,
    mesh: Mesh,
    workdir: Path,
    model_hash: str,
    progress: Callable[[str], None],
) -> Float[np.ndarray, "rows draws 2"] | None:
    """Reads the table of a run, computing the draws that are not there.

    Args:
      config: from `settings.resolve`; `reference`: draws, 0 for no table, and path.
      pipeline: the base.
      cache: what the run trains on.
      mesh: whose batch shards the rows are split over.
      workdir: of the run, for its own table.
      model_hash: of the UNet and its noise schedule.
      progress: takes lines of text: done, rate, time left.

    Returns:
      Squared errors on winner and loser by row_id and draw, NaN of rows that the strategy leaves
      out; None without draws.

    Raises:
      UserError: a damaged file, or a full disk.
    """
    if not (draws := config.reference.draws):
        return None
    which = STRATEGIES[config.rows]
    rows = np.sort(np.concatenate([2 * np.arange(cache.num_pairs) + w for w in which]))
    key = storage.digest(
        {
            "model": model_hash,
            "cache": cache.key,
            **{k: config[k] for k in ("rows", "seed", "dtype", "matmul_precision")},
            **{k: config.loss[k] for k in ("t_min", "t_max", "caption_dropout")},
        }
    )
    folder = Path(config.reference.path or workdir / "reference") / key[:16]
    files = [folder / f"draw_{i:05d}.safetensors" for i in range(draws)]
    # Of a job's processes the first has the files, and all compute.
    missing = processes.first(lambda: [i for i, file in enumerate(files) if not file.is_file()])
    if missing:
        progress(f"reference: {len(rows)} rows, {len(missing)} of {draws} draws to be computed")
        errors = make_errors(pipeline, config, mesh)
        null = sharding.put(cache.null, sharding.replicated(mesh))
        pace = Pace(len(missing))
        for done, draw in enumerate(missing):
            found = np.empty((len(rows), 2), np.float32)
            for start in range(0, len(rows), config.batch_size):
                # A short last batch is filled up, so that its shape needs no compilation.
                index = np.minimum(np.arange(start, start + config.batch_size), len(rows) - 1)
                batch = pair_batch(cache, rows[index], np.full_like(index, draw))
                batch = sharding.put(batch, sharding.batch_sharding(mesh))
                with jax.default_matmul_precision(config.matmul_precision), jax.set_mesh(mesh):
                    found[index] = errors(pipeline.unet_params, batch, null)
                part = done + min(1, (start + config.batch_size) / len(rows))
                if part < len(missing) and pace.due(part):
                    progress(
                        f"reference: {part:.2f}/{len(missing)} draws, "
                        f"{pace.rate(part) * len(rows):.1f} rows/s, {pace.left(part):.0f} s left"
                    )
            if processes.is_first():
                write_tensors(files[draw], {"errors": found.shape}, [("errors", found)])
        progress(f"reference: {folder}, {draws} draws of {len(rows)} rows")
    table = np.full((2 * cache.num_pairs, draws, 2), np.nan, np.float32)
    if processes.is_first():
        for i, file in enumerate(files):
            with opened(file) as kept:
                table[rows, i] = kept.read("errors")
    return processes.first_arrays(table)


def make_errors(
    pipeline: Any, config: ConfigDict, mesh: Mesh
) -> Callable[[Any, Batch, Conditioning], Float[Array, "b 2"]]:
    """Compiles `errors(base_params, batch, null)`, the base's on a batch's winners and losers."""
    seed, predict = noise_seed(config), make_predict(pipeline.unet, mesh)

    def errors(params: Any, batch: Batch, null: Conditioning) -> Float[Array, "b 2"]:
        batch = jax.tree.map(full_precision, batch)
        pairs = noisy_pairs(seed, batch, null, pipeline.schedule, config)
        inputs = [(x, pairs.timesteps, pairs.conditioning) for x in pairs.latents]
        outputs = jnp.split(predict({"params": params}, inputs), 2)
        return jnp.stack(
            [squared_error(x, y) for x, y in zip(outputs, pairs.targets, strict=True)], axis=1
        )

    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(errors, in_shardings=(None, split, whole), out_shardings=whole)
