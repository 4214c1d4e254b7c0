"""Stage three: the text encoder and the UNet, trained together on the latents."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.models.text_encoder import CLIPTextModel
from safetydpo_jax.models.unet import UNet2DConditionModel
from safetydpo_jax.pretrain.fit import fit, quiet_residuals


def train_denoiser(
    config: Any,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    schedule: NoiseSchedule,
    moments: tuple[np.ndarray, np.ndarray],
    scaling_factor: float,
    tokens: np.ndarray,
    empty_tokens: np.ndarray,
    workdir: pathlib.Path,
    *,
    seed: int,
    start: Mapping[str, Any] | None = None,
    evaluate: Callable[[Any, int], dict[str, float]] | None = None,
) -> Any:
    """Trains text encoder and UNet; returns {"unet": ..., "text_encoder": ...}.

    Args:
      moments: mean and standard deviation of the latents, (n, h, w, c) each.
      scaling_factor: what latents are multiplied by.
      tokens: captions' ids (n, t).
      empty_tokens: ids (t,) of the empty caption, put in place of a share `caption_dropout` of the
        captions, so that classifier-free guidance works.
      start: parameters of "unet", "text_encoder" or both, in place of random ones.
    """
    count, shape = len(tokens), moments[0].shape[1:]
    key = jax.random.key(seed)
    ids = jnp.zeros((1, tokens.shape[1]), jnp.int32)
    text_params = jax.jit(text_encoder.init)(key, ids)["params"]
    embeds = jnp.zeros((1, tokens.shape[1], text_encoder.config.hidden_size))
    example = (jnp.zeros((1, *shape)), jnp.zeros((1,), jnp.int32), embeds)
    unet_params: Any = jax.jit(unet.init)(key, *example)
    # As in diffusion models since DDPM: the last layer starts at zero, and so does each branch.
    unet_params = quiet_residuals(unet_params["params"], ("conv2", "proj_out", "conv_out"))
    params = {"unet": unet_params, "text_encoder": text_params} | dict(start or {})

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        mean, std, ids = batch
        n = mean.shape[0]
        latents = mean.astype(jnp.float32)
        latents += std.astype(jnp.float32) * jax.random.normal(keys[0], latents.shape)
        latents *= scaling_factor
        dropped = jax.random.bernoulli(keys[1], config.caption_dropout, (n, 1))
        ids = jnp.where(dropped, empty_tokens[None], ids)
        text: Any = text_encoder.apply({"params": params["text_encoder"]}, ids)
        # One timestep from each of n equally likely stretches, so that every batch covers all; by
        # a logit-normal density (Esser et al. 2024), which is highest where concepts are decided.
        quantiles = (jnp.arange(n) + jax.random.uniform(keys[2], (n,))) / n
        logits = config.timestep_mean + config.timestep_spread * jax.scipy.special.ndtri(quantiles)
        t = (jax.nn.sigmoid(logits) * schedule.num_train_timesteps).astype(jnp.int32)
        t = jnp.clip(t, 0, schedule.num_train_timesteps - 1)
        noise = jax.random.normal(keys[3], latents.shape)
        noisy = schedule.add_noise(latents, noise, t)
        output: Any = unet.apply({"params": params["unet"]}, noisy, t, text.last_hidden_state)
        loss = jnp.square(output - schedule.target(latents, noise, t)).mean()
        return loss, {}

    def batches(step: int) -> tuple[np.ndarray, ...]:
        # An epoch is a permutation; a step may cross from one epoch to the next.
        first = step * config.batch_size
        rows = []
        for epoch in range(first // count, (first + config.batch_size - 1) // count + 1):
            order = np.random.default_rng((seed, epoch)).permutation(count)
            low, high = first - epoch * count, first + config.batch_size - epoch * count
            rows.append(order[max(low, 0) : min(high, count)])
        rows = np.concatenate(rows)
        return moments[0][rows], moments[1][rows], tokens[rows]

    return fit("denoiser", config, params, loss_fn, batches, workdir, seed=seed, evaluate=evaluate)
