"""A row's randomness: it belongs to the row and its draw, not to a batch, a step or a device.

So one device or many, one big batch or an accumulated one, a fresh run or a resumed one all see the
same numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.models.conditioning import Conditioning, per_row, where

Moments = Mapping[str, Any]  # "mean" and "logvar" (b, h, w, c) of scaled latents


class NoisyRows(NamedTuple):
    """What the UNet gets for some rows, and what it should answer.

    Attributes:
      latents: x_t of each of a row's pictures, all at the row's one timestep and noise.
      targets: the right answers to them.
      timesteps: of the rows.
      conditioning: of the captions, some dropped.
      dropped: which.
    """

    latents: list[Float[Array, "b h w c"]]
    targets: list[Float[Array, "b h w c"]]
    timesteps: Int[Array, "b"]
    conditioning: Conditioning
    dropped: Bool[Array, "b"]

    @property
    def inputs(self) -> list[tuple[Array, Array, Conditioning]]:
        """What the UNet is called with, by picture: latents, timesteps, prompts."""
        return [(x, self.timesteps, self.conditioning) for x in self.latents]


def row_keys(
    seed: Key[Array, ""],
    row_id: UInt[Array | np.ndarray, "b"],
    draw: UInt[Array | np.ndarray, "b"],
) -> Key[Array, "b"]:
    """One random key for each (row, draw)."""
    return jax.vmap(lambda r, d: jax.random.fold_in(jax.random.fold_in(seed, r), d))(row_id, draw)


def noisy_rows(
    keys: Key[Array, "b"],
    pictures: Sequence[Moments],
    conditioning: Conditioning,
    null: Conditioning,
    schedule: NoiseSchedule,
    *,
    t_min: int,
    t_max: int,
    caption_dropout: float,
    text_noise: float = 0.0,
    lean: Conditioning | None = None,
) -> NoisyRows:
    """Draws latents from the moments, noises them, and drops captions.

    Args:
      keys: from `row_keys`.
      pictures: the moments of each of a row's pictures, as winner and loser.
      conditioning: of the captions.
      null: what takes the place of a dropped caption's, without rows.
      schedule: of the base model.
      t_min: the first timestep that may be drawn.
      t_max: one past the last.
      caption_dropout: probability of dropping a caption.
      text_noise: standard deviation of what is added to the text states of captions that stay.
      lean: what is added to them too, times a number drawn from -1 to 1.
    """
    shape = pictures[0]["mean"].shape[1:]

    def draw(key: Key[Array, ""]) -> tuple[Array, Array, Array]:
        # As few calls as can be: every call of the generator adds seconds to the compilation.
        uniform_key, normal_key, text_key = jax.random.split(key, 3)
        uniforms = jax.random.uniform(uniform_key, (3,))
        return uniforms, jax.random.normal(normal_key, (1 + len(pictures), *shape)), text_key

    uniforms, normals, text_keys = jax.vmap(draw)(keys)
    t = t_min + (uniforms[:, 0] * (t_max - t_min)).astype(jnp.int32)
    dropped = uniforms[:, 1] < caption_dropout
    noise, samples = normals[:, 0], normals[:, 1:]
    x0s = [m["mean"] + jnp.exp(0.5 * m["logvar"]) * samples[:, i] for i, m in enumerate(pictures)]
    if text_noise > 0:
        states = conditioning.prompt_embeds
        noise_of = jax.vmap(lambda key: jax.random.normal(key, states.shape[1:]))
        conditioning = conditioning._replace(
            prompt_embeds=states + text_noise * noise_of(text_keys)
        )
    if lean is not None:
        share = 2 * uniforms[:, 2] - 1
        conditioning = jax.tree.map(
            lambda x, way: x + per_row(share, x.ndim) * way, conditioning, lean
        )
    return NoisyRows(
        [schedule.add_noise(x0, noise, t) for x0 in x0s],
        [schedule.target(x0, noise, t) for x0 in x0s],
        t,
        where(dropped, null, conditioning),
        dropped,
    )
