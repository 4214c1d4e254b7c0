"""One update of the adapters, compiled for the whole mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from safetydpo_jax import sharding
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import Adapters, routed, scaled
from safetydpo_jax.models import winograd
from safetydpo_jax.models.conditioning import Conditioning, where
from safetydpo_jax.train.losses import (
    PREFERENCES,
    preference_margin,
    preserve_winner,
    squared_error,
)
from safetydpo_jax.train.noise import NoisyRows, noisy_rows, row_keys
from safetydpo_jax.train.state import TrainState, learning_rate, make_optimizer

Batch = Mapping[str, Any]
Inputs = Sequence[tuple[Array, Array, Conditioning]]  # noisy latents, timesteps, prompts
Metrics = dict[str, Float[Array, "*experts"]]
Parts = dict[str, Float[Array, "*experts"]]
# XLA's CPU backend drops the barriers that keep recomputed work apart, and merges it again.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
SPARING = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class Numbers(NamedTuple):
    """What of a config a step is told at each call: with other values it is the same program.

    Attributes:
      learning_rate: of this update.
      beta: as in `config.loss`, like the others.
      preservation: a weight; a config that has 0 is another program.
      winner_anchor: the same.
    """

    learning_rate: Any
    beta: Any
    preservation: Any
    winner_anchor: Any


LossFn = Callable[[Adapters, Any, Batch, Conditioning, Numbers], tuple[Parts, Metrics]]


def make_loss(
    unet: nn.Module,
    schedule: NoiseSchedule,
    config: ConfigDict,
    mesh: Mesh,
    experts: int | None = None,
) -> LossFn:
    """The loss of one batch as a function of the adapters; arguments as of `make_train_step`.

    Returns:
      `loss(adapters, base_params, batch, null, numbers) -> (parts, metrics)`, the parts as
      `part_names` has them; of each expert its own, if there are several.
    """
    weights = config.loss
    preference = PREFERENCES[weights.preference]
    predict = make_predict(unet, mesh)

    def mean(of_rows: Array) -> Array:
        return of_rows.reshape(-1, experts).mean(0) if experts else of_rows.mean()

    def loss(
        adapters: Adapters, base_params: Any, batch: Batch, null: Conditioning, numbers: Numbers
    ) -> tuple[Parts, Metrics]:
        batch = jax.tree.map(full_precision, batch)
        if experts:  # row by row, so that none has to leave its device
            batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        pairs = noisy_pairs(batch, null, schedule, config)

        def reference_of(inputs: Inputs) -> Any:
            return jax.lax.stop_gradient(predict({"params": base_params}, inputs))

        inputs = pairs.inputs
        if weights.preservation > 0:
            inputs += noisy_preserved(batch["preserve"], null, schedule, config).inputs

        # One forward pass for all, and the reference through the same code at the same shapes: what
        # their rounding has in common cancels in the margin.
        lora = scaled(adapters, config.lora.alpha, config.lora.rank)
        if experts:
            lora = routed(lora, jnp.arange(sum(len(x) for x, _, _ in inputs)) % experts)
        policy = predict({"params": base_params, "lora": lora}, inputs)
        ends = [len(pairs.timesteps), 2 * len(pairs.timesteps)]
        winner, loser, preserved = jnp.split(policy, ends)
        if known := batch.get("reference"):  # the tables': the same draws, known before
            errors, preserved_ref = known["errors"].T, known.get("preserved")
        else:
            winner_ref, loser_ref, preserved_ref = jnp.split(reference_of(inputs), ends)
            errors = map(squared_error, (winner_ref, loser_ref), pairs.targets)
        winner_error, loser_error = (
            squared_error(output, target) - error
            for output, target, error in zip((winner, loser), pairs.targets, errors, strict=True)
        )
        margin = preference_margin(winner_error, loser_error, numbers.beta)
        terms, others = {"preference_loss": mean(preference(margin))}, []
        if weights.winner_anchor > 0:
            # What is to be drawn instead of the loser: the base's own answers under the winner's
            # prompt, on both pictures. The true noise is known for the winner only, and varies.
            if known:
                wanted = jnp.concatenate([*jnp.moveaxis(known["wanted"], 1, 0)])
            else:
                wanted = reference_of(under_winners_prompt(pairs, batch, null).inputs)
            drawn = jnp.concatenate([winner, loser])
            terms["winner_anchor"] = mean(squared_error(drawn, wanted))
            others.append(numbers.winner_anchor * terms["winner_anchor"])
        if weights.preservation > 0:
            terms["preservation"] = mean(squared_error(preserved, preserved_ref))
            others.append(numbers.preservation * terms["preservation"])
        parts = {"loss": sum(others, start=terms["preference_loss"])}
        metrics = {
            **parts,
            **terms,
            "margin": mean(margin),
            "implicit_accuracy": mean(margin > 0),
            "winner_error": mean(winner_error),
            "loser_error": mean(loser_error),
        }
        if weights.preference == "winner_preserving":
            # The same loss twice, each time with one of the two errors held still.
            still = jax.lax.stop_gradient
            of_winner = preference_margin(winner_error, still(loser_error), numbers.beta)
            of_loser = preference_margin(still(winner_error), loser_error, numbers.beta)
            parts = {"winner": mean(preference(of_winner)), "loser": mean(preference(of_loser))}
            if others:
                parts["others"] = functools.reduce(jnp.add, others)
        return parts, metrics

    return loss


def numbers_of(config: ConfigDict) -> Callable[[int], Numbers]:
    """What the step after so many is told, float32 scalars; `config` is of `settings.resolve`."""
    steps = jnp.arange(config.steps + 1)
    rates = np.asarray(jax.jit(jax.vmap(learning_rate(config)))(steps), np.float32)
    loss = config.loss
    others = [np.float32(x) for x in (loss.beta, loss.preservation, loss.winner_anchor)]
    return lambda step: Numbers(rates[min(step, config.steps)], *others)


def noise_seed(config: ConfigDict) -> Key[Array, ""]:
    """What all draws of a run come from, by `noise.row_keys`."""
    # threefry is the one generator whose values do not depend on vmap or sharding.
    return jax.random.key(config.seed, impl="threefry2x32")


def noisy_pairs(
    batch: Batch,
    null: Conditioning,
    schedule: NoiseSchedule,
    config: ConfigDict,
) -> NoisyRows:
    """A batch's winners and losers as the UNet is to see them."""
    weights = config.loss
    return noisy_rows(
        row_keys(noise_seed(config), batch["row_id"], batch["draw"]),
        [batch["winner"], batch["loser"]],
        batch["conditioning"],
        null,
        schedule=schedule,
        t_min=weights.t_min,
        t_max=weights.t_max,
        caption_dropout=weights.caption_dropout,
    )


def under_winners_prompt(pairs: NoisyRows, batch: Batch, null: Conditioning) -> NoisyRows:
    """The rows of `noisy_pairs` once more, whatever their own prompts are."""
    prompts = where(pairs.dropped, null, batch["winner_conditioning"])
    return pairs._replace(conditioning=prompts)


def noisy_preserved(
    rows: Batch, null: Conditioning, schedule: NoiseSchedule, config: ConfigDict
) -> NoisyRows:
    """A batch's preserve rows as the UNet is to see them."""
    weights = config.loss
    # The adapter acts at every timestep, so that is where the base must be preserved.
    return noisy_rows(
        row_keys(noise_seed(config), rows["row_id"], rows["draw"]),
        [rows],
        rows["conditioning"],
        null,
        schedule=schedule,
        t_min=0,
        t_max=schedule.num_train_timesteps,
        caption_dropout=weights.preservation_dropout,
        text_noise=weights.preservation_text_noise,
        lean=jax.tree.map(lambda x: weights.preservation_lean * x, rows["harm"]),
    )


def make_predict(unet: nn.Module, mesh: Mesh) -> Callable[[Any, Inputs], Any]:
    """The UNet's outputs for several lists of rows, in one pass."""

    def predict(variables: Any, inputs: Inputs) -> Any:
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *inputs)
        latents, timesteps, conditioning = jax.lax.with_sharding_constraint(
            stacked, sharding.batch_sharding(mesh)
        )
        return unet.apply(variables, latents, timesteps, *conditioning)

    return predict


def part_names(config: ConfigDict) -> tuple[str, ...]:
    """What of the loss has a gradient of its own.

    That is "loss", the whole. With "winner_preserving" it is the preference loss as a function of
    the "winner" alone and of the "loser" alone, and the "others" among the terms, if there are any.
    """
    weights = config.loss
    if weights.preference != "winner_preserving":
        return ("loss",)
    others = weights.winner_anchor > 0 or weights.preservation > 0
    return ("winner", "loser", "others") if others else ("winner", "loser")


def make_train_step(
    unet: nn.Module,
    schedule: NoiseSchedule,
    config: ConfigDict,
    mesh: Mesh,
    experts: int | None = None,
) -> Any:
    """Compiles one optimiser step, of one expert or of several at once.

    Several have nothing in common but the base and the forward passes: each has its own rows, mean
    loss, clipping and moments, and ends as it would have alone.

    Args:
      unet: called as `unet.apply({"params", "lora"?}, latents, timesteps, *conditioning)`.
      schedule: the base model's noise schedule.
      config: from `settings.resolve`.
      mesh: from `sharding.make_mesh`; `sharding.put` and `put_rows` lay out on it. On several TPUs
        the step must be called within `jax.set_mesh(mesh)`; see `models.attention`.
      experts: how many, if the state is that of several. The batch's arrays then have the experts
        as their second axis, (rows, experts, ...), and the metrics are (experts,).

    Returns:
      A jitted `step(state, base_params, batch, null, numbers) -> (state, metrics)`, which donates
      `state`; `numbers_of` has the last argument.
      The batch, as `data.batches` yields it, holds batch_size * accumulation rows and
      preserve_batch_size * accumulation preserve rows; with "reference", what the base answers on
      them, the reference pass is left out; null, without rows, is what takes the place of a dropped
      prompt. The gradient is the mean over the accumulated batches, that of one big batch. Metrics
      are float32 scalars: the terms unweighted,
      "winner_error" and "loser_error" the policy's minus the reference's, "loser_scale" that of
      `losses.preserve_winner`, "grad_norm" before clipping.

    Raises:
      UserError: the batch does not divide over the mesh, or the timestep range is empty.
    """
    t_min, t_max, total_timesteps = (
        config.loss.t_min,
        config.loss.t_max,
        schedule.num_train_timesteps,
    )
    if not 0 <= t_min < t_max <= total_timesteps:
        raise UserError(
            f"config.loss.t_min is {t_min} and t_max {t_max}: "
            f"0 <= t_min < t_max <= {total_timesteps} must hold"
        )
    sharding.check_batch(
        mesh, batch_size=config.batch_size, preserve_batch_size=config.preserve_batch_size
    )
    k, names = config.accumulation, part_names(config)
    loss = make_loss(unet, schedule, config, mesh, experts)

    def update(
        gradients: dict[str, Adapters], adapters: Adapters, opt_state: Any, rate: Array
    ) -> tuple[Any, Any, Metrics]:
        """An expert's adapters and moments, from the gradients of its loss's parts."""
        metrics = {"lr": rate}
        if "loser" in gradients:
            winner, metrics["loser_scale"] = preserve_winner(
                gradients["winner"], gradients["loser"]
            )
            others = {"others": gradients["others"]} if "others" in gradients else {}
            gradients = {"winner": winner, **others}
        gradient = functools.reduce(optax.tree.add, gradients.values())
        metrics["grad_norm"] = optax.tree.norm(gradient)
        optimizer = make_optimizer(config, rate)
        updates, opt_state = optimizer.update(gradient, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, metrics

    def step(
        state: TrainState,
        base_params: Any,
        batch: Batch,
        null: Conditioning,
        numbers: Numbers,
    ) -> tuple[TrainState, Metrics]:
        def gradients_of(batch: Batch) -> tuple[dict[str, Adapters], Metrics]:
            """Of each part: one forward pass for all, a backward pass for each."""
            with winograd.kernels_kept(not config.remat):
                parts, pull_back, metrics = jax.vjp(
                    lambda adapters: loss(adapters, base_params, batch, null, numbers),
                    state.adapters,
                    has_aux=True,
                )
                # An expert's adapters act on its own rows alone: the sum's gradient has them apart.
                one_hots = {
                    part: {x: jnp.full_like(parts[x], x == part) for x in names} for part in names
                }
                gradients = {part: pull_back(one_hot)[0] for part, one_hot in one_hots.items()}
            return gradients, metrics

        def accumulate(totals: dict[str, Adapters], microbatch: Batch) -> tuple[Any, Metrics]:
            gradients, metrics = gradients_of(microbatch)
            return jax.tree.map(jnp.add, totals, gradients), metrics

        if k == 1:  # in a loop, even of one turn, XLA's CPU backend takes twice as long
            gradients, metrics = gradients_of(batch)
        else:
            microbatches = jax.tree.map(lambda x: split_microbatches(x, k), batch)
            zeros = {part: jax.tree.map(jnp.zeros_like, state.adapters) for part in names}
            totals, metrics = jax.lax.scan(accumulate, zeros, microbatches)
            gradients = jax.tree.map(lambda x: x / k, totals)
            metrics = jax.tree.map(lambda x: x.mean(0), metrics)
        of_each = jax.vmap(update, in_axes=(0, 0, 0, None)) if experts else update
        adapters, opt_state, more = of_each(
            gradients, state.adapters, state.opt_state, numbers.learning_rate
        )
        return TrainState(state.step + 1, adapters, opt_state), metrics | more

    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, None, split, whole, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, remat=config.remat),
    )


def compiler_options(mesh: Mesh, *, remat: bool) -> dict[str, str] | None:
    """What XLA is told of a program with a gradient, that `remat` spares memory on CPUs too."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    return KEEP_BARRIERS | (SPARING if remat else {})


def full_precision(x: Array | np.ndarray) -> Array | np.ndarray:
    """What a cache holds in half precision travels as that."""
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def split_microbatches(x: Array, k: int) -> Array:
    """(B * k, ...) as (k, B, ...), by every k-th row, so that no row has to leave its device."""
    return jnp.swapaxes(x.reshape(-1, k, *x.shape[1:]), 0, 1)
