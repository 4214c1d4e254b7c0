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

from safetydpo_jax.errors import UserError


class FitState(NamedTuple):
    """What a stage's checkpoint holds; `average` is the exponential moving average of params."""

    step: Int[Array, ""]
    params: Any
    average: Any
    opt_state: Any


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW with clipping; warm-up, a constant stretch, and a linear decay to 0 at the end.

    The constant stretch lets a stopped run be extended: only the decay depends on `steps`.

    Args:
      config: a ConfigDict with learning_rate, warmup_steps, decay_steps, steps, b2, weight_decay.
    """
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, config.decay_steps),
        ],
        [config.warmup_steps, config.steps - config.decay_steps],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=config.b2, weight_decay=config.weight_decay),
    )


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
      name: of the stage; its checkpoints and its metrics.jsonl lie in workdir/name.
      config: steps, optimizer settings, average_decay, log_every, save_every, matmul_precision.
      params: initial parameters.
      loss_fn: (params, batch, key) -> (loss, metrics), traced once.
      batches: step -> batch, a pure function, so that a resumed run sees what the killed one would.
      workdir: of the run.
      seed: each step's key is fold_in(seed, step).
      evaluate: (averaged params, step) -> figures, called where a checkpoint is written.
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
    with jax.default_matmul_precision(config.matmul_precision):
        compiled = jax.jit(step_fn, donate_argnums=0)
        started = time.perf_counter()
        with (folder / "metrics.jsonl").open("a") as log:
            for step in range(first, config.steps):
                state, metrics = compiled(state, batches(step))
                done = step + 1
                last = done == config.steps
                if done % config.log_every == 0 or last:
                    figures = {k: float(v) for k, v in metrics.items()}
                    if not np.isfinite(figures["loss"]):
                        raise UserError(
                            f"{name}: the loss is {figures['loss']} at step {done}; lower"
                            f" learning_rate. The last checkpoint in {folder} is from before."
                        )
                    elapsed = time.perf_counter() - started
                    rate = (done - first) / elapsed
                    log.write(json.dumps({"step": done, "seconds": elapsed, **figures}) + "\n")
                    log.flush()
                    text = " ".join(f"{k} {v:.4g}" for k, v in figures.items())
                    eta = (config.steps - done) / rate / 60
                    print(
                        f"{name}: {done}/{config.steps} {text} | {rate:.2f} steps/s,"
                        f" {eta:.1f} min left",
                        flush=True,
                    )
                if done % config.save_every == 0 or last:
                    manager.save(done, args=ocp.args.StandardSave(state), force=last)
                    manager.wait_until_finished()
                    if evaluate is not None:
                        figures = evaluate(state.average, done)
                        log.write(json.dumps({"step": done, **figures}) + "\n")
                        print(f"{name}: at {done} " + json.dumps(figures), flush=True)
    manager.close()
    return state.average
