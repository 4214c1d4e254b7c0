"""One update of the adapters, compiled for the whole mesh."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from safetydpo_jax import sharding
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import Adapters, scaled
from safetydpo_jax.train.losses import dpo_loss, squared_error
from safetydpo_jax.train.noise import noisy_rows, row_keys
from safetydpo_jax.train.state import TrainState, learning_rate, make_optimizer

Batch = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
LossFn = Callable[[Adapters, Any, Batch, Float[Array, "t d"]], tuple[Float[Array, ""], Metrics]]


def make_loss(unet: nn.Module, schedule: NoiseSchedule, config: ConfigDict, mesh: Mesh) -> LossFn:
    """The loss of one batch as a function of the adapters; arguments as of `make_train_step`.

    Returns:
      `loss(adapters, base_params, batch, null_embeds) -> (loss, metrics)`.
    """
    weights = config.loss
    # threefry is the one generator whose values do not depend on vmap or sharding.
    seed = jax.random.key(config.seed, impl="threefry2x32")

    def loss(
        adapters: Adapters, base_params: Any, batch: Batch, null_embeds: Float[Array, "t d"]
    ) -> tuple[Float[Array, ""], Metrics]:
        pairs = noisy_rows(
            row_keys(seed, batch["row_id"], batch["draw"]),
            [batch["winner"], batch["loser"]],
            batch["prompt_embeds"],
            null_embeds,
            schedule=schedule,
            t_min=weights.t_min,
            t_max=weights.t_max,
            caption_dropout=weights.caption_dropout,
        )

        def stack(inputs: Sequence[tuple[Array, Array, Array]]) -> list[Array]:
            stacked = [jnp.concatenate(x) for x in zip(*inputs, strict=True)]
            return jax.lax.with_sharding_constraint(stacked, sharding.batch_sharding(mesh))

        def reference_of(inputs: Sequence[tuple[Array, Array, Array]]) -> Any:
            return jax.lax.stop_gradient(unet.apply({"params": base_params}, *stack(inputs)))

        inputs = [(x, pairs.timesteps, pairs.prompt_embeds) for x in pairs.latents]
        if weights.preservation > 0:
            rows = batch["preserve"]
            # The adapter acts at every timestep, so that is where the base must be preserved.
            preserve = noisy_rows(
                row_keys(seed, rows["row_id"], rows["draw"]),
                [rows],
                rows["prompt_embeds"],
                null_embeds,
                schedule=schedule,
                t_min=0,
                t_max=schedule.num_train_timesteps,
                caption_dropout=weights.preservation_dropout,
                text_noise=weights.preservation_text_noise,
                lean=weights.preservation_lean * rows["harm_embeds"],
            )
            inputs.append((preserve.latents[0], preserve.timesteps, preserve.prompt_embeds))

        # One forward pass for all, and the reference through the same code at the same shapes: what
        # their rounding has in common cancels in the margin.
        lora = scaled(adapters, config.lora.alpha, config.lora.rank)
        policy: Any = unet.apply({"params": base_params, "lora": lora}, *stack(inputs))
        reference = reference_of(inputs)

        ends = [len(pairs.timesteps), 2 * len(pairs.timesteps)]
        winner, loser, preserved = jnp.split(policy, ends)
        winner_ref, loser_ref, preserved_ref = jnp.split(reference, ends)
        winner_error, loser_error, winner_error_ref, loser_error_ref = (
            squared_error(output, target)
            for output, target in zip(
                (winner, loser, winner_ref, loser_ref), pairs.targets * 2, strict=True
            )
        )
        dpo = dpo_loss(winner_error, loser_error, winner_error_ref, loser_error_ref, weights.beta)
        terms = {"dpo_loss": dpo.loss.mean()}
        total = terms["dpo_loss"]
        if weights.winner_anchor > 0:
            # What is to be drawn instead of the loser: the base's own answers under the winner's
            # prompt, on both pictures. The true noise is known for the winner only, and varies.
            prompts = jnp.where(
                pairs.dropped[:, None, None], null_embeds, batch["winner_prompt_embeds"]
            )
            wanted = reference_of([(x, pairs.timesteps, prompts) for x in pairs.latents])
            drawn = jnp.concatenate([winner, loser])
            terms["winner_anchor"] = squared_error(drawn, wanted).mean()
            total += weights.winner_anchor * terms["winner_anchor"]
        if weights.preservation > 0:
            terms["preservation"] = squared_error(preserved, preserved_ref).mean()
            total += weights.preservation * terms["preservation"]
        return total, {
            "loss": total,
            **terms,
            "margin": dpo.margin.mean(),
            "implicit_accuracy": dpo.correct.mean(),
            "winner_error": (winner_error - winner_error_ref).mean(),
            "loser_error": (loser_error - loser_error_ref).mean(),
        }

    return loss


def make_train_step(
    unet: nn.Module, schedule: NoiseSchedule, config: ConfigDict, mesh: Mesh
) -> Any:
    """Compiles one optimiser step.

    Args:
      unet: called as `unet.apply({"params", "lora"?}, latents, timesteps, prompt_embeds)`.
      schedule: the base model's noise schedule.
      config: from `settings.resolve`.
      mesh: from `sharding.make_mesh`; the batch is split over its "data" axis.

    Returns:
      A jitted `step(state, base_params, batch, null_embeds) -> (state, metrics)`, which donates
      `state`. The batch, as `data.batches` yields it, holds batch_size * accumulation rows and
      preserve_batch_size * accumulation preserve rows; null_embeds (t, d) is the empty prompt. The
      gradient is the mean over the accumulated batches, that of one big batch. Metrics are float32
      scalars: the terms unweighted, "winner_error" and "loser_error" the policy's minus the
      reference's, "grad_norm" before clipping.

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
    optimizer, rate, k = make_optimizer(config), learning_rate(config), config.accumulation
    gradient_of = jax.grad(make_loss(unet, schedule, config, mesh), has_aux=True)

    def step(
        state: TrainState, base_params: Any, batch: Batch, null_embeds: Float[Array, "t d"]
    ) -> tuple[TrainState, Metrics]:
        def accumulate(total: Adapters, microbatch: Batch) -> tuple[Adapters, Metrics]:
            gradient, metrics = gradient_of(state.adapters, base_params, microbatch, null_embeds)
            return jax.tree.map(jnp.add, total, gradient), metrics

        if k == 1:  # in a loop, even of one turn, XLA's CPU backend takes twice as long
            gradient, metrics = gradient_of(state.adapters, base_params, batch, null_embeds)
        else:
            microbatches = jax.tree.map(lambda x: split_microbatches(x, k), batch)
            zeros = jax.tree.map(jnp.zeros_like, state.adapters)
            total, metrics = jax.lax.scan(accumulate, zeros, microbatches)
            gradient = jax.tree.map(lambda x: x / k, total)
            metrics = jax.tree.map(lambda x: x.mean(0), metrics)
        metrics |= {"grad_norm": optax.tree.norm(gradient), "lr": jnp.float32(rate(state.step))}
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        return TrainState(state.step + 1, adapters, opt_state), metrics

    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, None, split, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


def split_microbatches(x: Array, k: int) -> Array:
    """(B * k, ...) as (k, B, ...), by every k-th row, so that no row has to leave its device."""
    return jnp.swapaxes(x.reshape(-1, k, *x.shape[1:]), 0, 1)
