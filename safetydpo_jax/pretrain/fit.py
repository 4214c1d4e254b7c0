"""The loop that both networks are trained with: averaged weights, progress, resume."""

import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.train.board import Board
from safetydpo_jax.train.metrics import lines_until
from safetydpo_jax.train.workdir import stop_signal


class FitState(NamedTuple):
    """What a stage's checkpoint holds; `average` is the exponential moving average of params."""

    step: Int[Array, ""]
    params: Any
    average: Any
    opt_state: Any


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW or Muon with clipping; warm-up, a constant stretch, a linear decay to 0 at the end.

    The constant stretch lets a stopped run be extended: only the decay depends on `steps`. Muon
    (Jordan 2024) updates kernels, at AdamW's usual size (Liu et al. 2025), and AdamW the rest.

    Args:
      config: a ConfigDict with optimizer ("adamw" or "muon"), learning_rate, warmup_steps,
        decay_steps, steps, b2, weight_decay.

    Raises:
      UserError: there is no such optimizer, or steps are fewer than warm-up and decay.
    """
    if config.steps < config.warmup_steps + config.decay_steps:
        raise UserError(
            f"steps is {config.steps}, warmup_steps {config.warmup_steps} and decay_steps "
            f"{config.decay_steps}: steps must be as many as both, or lower those"
        )
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, config.decay_steps),
        ],
        [config.warmup_steps, config.steps - config.decay_steps],
    )
    if config.optimizer == "adamw":
        rule = optax.adamw(schedule, b1=0.9, b2=config.b2, weight_decay=config.weight_decay)
    elif config.optimizer == "muon":
        rule = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_kernels,
            consistent_rms=0.2,
        )
    else:
        raise UserError(f"optimizer is {config.optimizer!r}: it must be adamw or muon")
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def _kernels(params: Any) -> Any:
    """For Muon: how each kernel is a matrix, inputs by outputs; None where AdamW does better."""

    def axes(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name.endswith(".kernel") or "conv_in" in name or "conv_out" in name:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def quiet_residuals(params: Any, names: Sequence[str]) -> Any:
    """Zeroes the kernels of the named layers, the last of each residual branch.

    Every block starts as the identity, so that the network first learns what a shallow one can; an
    autoencoder learns several times faster so.
    """
    flat: dict[tuple[str, ...], Any] = dict(flatten_dict(params))
    flat = {
        path: jnp.zeros_like(x) if path[-1] == "kernel" and path[-2].endswith(tuple(names)) else x
        for path, x in flat.items()
    }
    return unflatten_dict(flat)


def fit(
    name: str,
    config: Any,
    params: Any,
    loss_fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    batches: Callable[[int], Any],
    workdir: pathlib.Path,
    *,
    seed: int,
    evaluate: Callable[[Any, int], dict[str, float]] | None = None,
) -> Any:
    """Trains `params` and returns their moving average.

    Args:
      name: of the stage; its checkpoints, metrics.jsonl and TensorBoard events lie in workdir/name.
      config: steps, optimizer settings, average_decay, log_every, save_every, matmul_precision.
      params: initial parameters.
      loss_fn: (params, batch, key) -> (loss, metrics), traced once.
      batches: step -> batch, a pure function, so that a resumed run sees what the killed one would.
      workdir: of the run.
      seed: each step's key is fold_in(seed, step).
      evaluate: (averaged params, step) -> figures, called where a checkpoint is written.

    Raises:
      UserError: the loss is not finite.
      SystemExit: stopped by SIGTERM or Ctrl-C; the state is saved.
    """
    optimizer = make_optimizer(config)
    state = FitState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params)
    )

    def step_fn(state: FitState, batch: Any) -> tuple[FitState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average warms up, so that it forgets the random start.
        decay = jnp.minimum(config.average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), state.average, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return FitState(state.step + 1, params, average, opt_state), metrics

    folder = pathlib.Path(workdir).resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    manager = ocp.CheckpointManager(
        folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    latest = manager.latest_step()
    if latest is not None:
        restored: Any = manager.restore(latest, args=ocp.args.StandardRestore(state))
        state = restored
        print(f"{name}: resuming at step {latest} of {config.steps}", flush=True)
    first = int(state.step)
    file = folder / "metrics.jsonl"
    storage.write_file(file, b"".join(lines_until(file, first)))  # not twice what a kill cut off
    board = Board(folder, first + 1)
    with (
        jax.default_matmul_precision(config.matmul_precision),
        file.open("a") as log,
        board,
        stop_signal() as stop,
    ):

        def write(step: int, figures: dict[str, float]) -> None:
            log.write(json.dumps({"step": step, **figures}) + "\n")
            log.flush()
            for key, value in figures.items():
                board.scalar(f"{name}/{key}", value, step)
            board.flush()

        compiled = jax.jit(step_fn, donate_argnums=0)
        started = time.perf_counter()
        for done in range(first + 1, config.steps + 1):
            state, metrics = compiled(state, batches(done - 1))
            stopped_by = stop.asked  # read once: a signal may come at any moment
            last = done == config.steps or stopped_by is not None
            to_save, to_log = (
                last or done % every == 0 for every in (config.save_every, config.log_every)
            )
            if to_save or to_log:
                figures = {k: float(v) for k, v in metrics.items()}
                # Before it is saved. The loss is of before the update, the gradient is the update.
                if not np.isfinite([figures["loss"], figures["grad_norm"]]).all():
                    raise UserError(
                        f"{name}: the loss is {figures['loss']} and its gradient's norm "
                        f"{figures['grad_norm']} at step {done}; lower learning_rate. {folder} has "
                        "the last checkpoint."
                    )
            if to_log:
                elapsed = time.perf_counter() - started
                rate = (done - first) / elapsed
                write(done, {"seconds": elapsed, **figures})
                text = " ".join(f"{k} {v:.4g}" for k, v in figures.items())
                print(
                    f"{name}: {done}/{config.steps} {text} | {rate:.2f} steps/s,"
                    f" {(config.steps - done) / rate / 60:.1f} min left",
                    flush=True,
                )
            if to_save:
                manager.save(done, args=ocp.args.StandardSave(state), force=last)
                manager.wait_until_finished()
                if evaluate is not None and (stopped_by is None or done == config.steps):
                    figures = evaluate(state.average, done)
                    write(done, figures)
                    print(f"{name}: at {done} " + json.dumps(figures), flush=True)
            if done == config.steps:
                stopped_by = stop.asked  # it may have come since
            if stopped_by is not None:
                print(f"{name}: stopped by {stopped_by.name}; step {done} is saved in {folder}")
                raise SystemExit(128 + stopped_by)
    manager.close()
    return state.average
