"""What the base answers on every draw of every row, computed once: tables instead of a pass a step.

Of the reference Diffusion-DPO asks two numbers a row, its squared errors on winner and loser; an
anchor and the preservation ask for its outputs. All depend on the row and its draw alone (`noise`),
so with a few draws a row, in turn, they can be known before. One file a table and draw, in folders
named by all that the answers depend on:

    reference/0123456789abcdef/errors_00000.safetensors     (rows, 2)
    reference/0123456789abcdef/wanted_00000.safetensors     (rows, 2, h, w, c), with an anchor
    reference/fedcba9876543210/preserved_00000.safetensors  (preserve rows, h, w, c)

All in float32, rows in the order of their row_id. More draws go on from fewer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from safetydpo_jax import processes, sharding, storage
from safetydpo_jax.data import (
    Cache,
    Reference,
    pair_batch,
    pair_rows,
    preserve_batch,
    preserve_rows,
)
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.pace import Pace
from safetydpo_jax.tensor_file import opened, write_tensors
from safetydpo_jax.train.losses import squared_error
from safetydpo_jax.train.step import (
    Batch,
    full_precision,
    make_predict,
    noisy_pairs,
    noisy_preserved,
    under_winners_prompt,
)

TOLD_BYTES = 2**26
Answer = Callable[[Any, Batch, Conditioning], Float[Array, "b *answer"]]


class _Table(NamedTuple):
    """What is to be known of some rows.

    Attributes:
      rows: their row_ids.
      read: their batch, from (cache, rows, draws).
      size: how many are in one.
      shape: of a row's answer.
      depends: on what of the config the answers depend, beside what all do.
    """

    rows: np.ndarray
    read: Callable[[Cache, np.ndarray, np.ndarray], Batch]
    size: int
    shape: tuple[int, ...]
    depends: Mapping[str, Any]


def reference_tables(
    config: ConfigDict,
    pipeline: Any,
    cache: Cache,
    mesh: Mesh,
    workdir: Path,
    model_hash: str,
    progress: Callable[[str], None],
) -> Reference | None:
    """Reads the tables of a run, computing the draws that are not there.

    Args:
      config: from `settings.resolve`; `reference`: draws, 0 for no tables, and path.
      pipeline: the base.
      cache: what the run trains on.
      mesh: whose batch shards the rows are split over.
      workdir: of the run, for its own tables.
      model_hash: of the UNet and its noise schedule.
      progress: takes lines of text: done, rate, time left.

    Returns:
      As `data.batches` takes it; None without draws.

    Raises:
      UserError: a damaged file, or a full disk.
    """
    if not (draws := config.reference.draws):
        return None
    home = Path(config.reference.path or workdir / "reference")
    answers = make_answers(pipeline, config, mesh)
    found = {}
    for name, table in _tables(config, cache).items():
        common = {k: config[k] for k in ("seed", "dtype", "matmul_precision")}
        key = storage.digest({"model": model_hash, "cache": cache.key, **common, **table.depends})
        files = [home / key[:16] / f"{name}_{i:05d}.safetensors" for i in range(draws)]
        params = pipeline.unet_params
        _complete(name, table, files, answers[name], params, config, cache, mesh, progress)
        found[name] = np.zeros((len(table.rows), draws, *table.shape), np.float32)
        for i, file in enumerate(files):
            answers_of_draw = found[name][:, i]
            processes.first(functools.partial(_read, file, name, answers_of_draw))
            _tell(answers_of_draw)
    return found


def _read(file: Path, name: str, into: np.ndarray) -> None:
    with opened(file) as kept:
        into[:] = kept.read(name)


def _tell(answers: np.ndarray) -> None:
    """Gives all processes the first one's, so many rows at a time as device memory has room for."""
    if jax.process_count() == 1:
        return
    rows = max(1, TOLD_BYTES // answers[0].nbytes)
    for start in range(0, len(answers), rows):
        answers[start : start + rows] = processes.first_arrays(answers[start : start + rows])


def _complete(
    name: str,
    table: _Table,
    files: Sequence[Path],
    answer_of: Any,
    params: Any,
    config: ConfigDict,
    cache: Cache,
    mesh: Mesh,
    progress: Callable[[str], None],
) -> None:
    """Writes the draws of a table that are not there, a file each."""
    # Of a job's processes the first has the files, and all compute.
    missing = processes.first(lambda: [i for i, file in enumerate(files) if not file.is_file()])
    if not missing:
        return
    count, what, pace = len(table.rows), f"reference: {name}", Pace(len(missing))
    progress(f"{what}, {count} rows, {len(missing)} of {len(files)} draws to be computed")
    null = sharding.put(cache.null, sharding.replicated(mesh))
    ask = None
    for done, draw in enumerate(missing):
        answer = np.empty((count, *table.shape), np.float32)
        for start in range(0, count, table.size):
            # A short last batch is filled up, so that its shape needs no compilation.
            index = np.minimum(np.arange(start, start + table.size), count - 1)
            batch = table.read(cache, table.rows[index], np.full_like(index, draw))
            batch = sharding.put(batch, sharding.batch_sharding(mesh))
            with jax.default_matmul_precision(config.matmul_precision), jax.set_mesh(mesh):
                if ask is None:
                    ask = answer_of.lower(params, batch, null).compile()
                    processes.meet()
                answer[index] = ask(params, batch, null)
            part = done + min(1, (start + table.size) / count)
            if part < len(missing) and pace.due(part):
                progress(
                    f"{what}, {part:.2f}/{len(missing)} draws, {pace.rate(part) * count:.1f} "
                    f"rows/s, {pace.left(part):.0f} s left"
                )
        processes.first(functools.partial(_write, files[draw], name, answer))
    progress(f"{what}, {len(files)} draws of {count} rows in {files[0].parent}")


def _write(file: Path, name: str, answers: np.ndarray) -> None:
    write_tensors(file, {name: answers.shape}, [(name, answers)])


def _tables(config: ConfigDict, cache: Cache) -> dict[str, _Table]:
    """Those that the config's loss asks for, by name."""
    loss = config.loss
    picture = jax.tree.leaves(cache.read(np.zeros(1, int))[0])[0].shape[1:]
    names = "t_min", "t_max", "caption_dropout"
    depends = {"rows": config.rows} | {k: loss[k] for k in names}
    errors = _Table(
        pair_rows(cache.num_pairs, config.rows), pair_batch, config.batch_size, (2,), depends
    )
    tables = {"errors": errors}
    if loss.winner_anchor > 0:
        tables["wanted"] = errors._replace(shape=(2, *picture))
    if loss.preservation > 0:
        names = "preservation_dropout", "preservation_text_noise", "preservation_lean"
        tables["preserved"] = _Table(
            preserve_rows(cache),
            preserve_batch,
            config.preserve_batch_size,
            picture,
            {k: loss[k] for k in names},
        )
    return tables


def make_answers(pipeline: Any, config: ConfigDict, mesh: Mesh) -> dict[str, Answer]:
    """What the base is asked, compiled when it is: `answer(base_params, batch, null)` by table."""
    predict, schedule = make_predict(pipeline.unet, mesh), pipeline.schedule

    def errors(params: Any, batch: Batch, null: Conditioning) -> Float[Array, "b 2"]:
        pairs = noisy_pairs(batch, null, schedule, config)
        outputs = jnp.split(predict({"params": params}, pairs.inputs), 2)
        return jnp.stack(
            [squared_error(x, y) for x, y in zip(outputs, pairs.targets, strict=True)], axis=1
        )

    def wanted(params: Any, batch: Batch, null: Conditioning) -> Float[Array, "b 2 h w c"]:
        pairs = under_winners_prompt(noisy_pairs(batch, null, schedule, config), batch, null)
        return jnp.stack(jnp.split(predict({"params": params}, pairs.inputs), 2), axis=1)

    def preserved(params: Any, batch: Batch, null: Conditioning) -> Float[Array, "b h w c"]:
        rows = noisy_preserved(batch, null, schedule, config)
        return predict({"params": params}, rows.inputs)

    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def compiled(answer: Answer) -> Answer:
        return jax.jit(
            lambda params, batch, null: answer(params, jax.tree.map(full_precision, batch), null),
            in_shardings=(None, split, whole),
            out_shardings=whole,
        )

    return {answer.__name__: compiled(answer) for answer in (errors, wanted, preserved)}
