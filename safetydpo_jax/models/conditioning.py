"""What a UNet is told of the prompt."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Shaped


class Conditioning(NamedTuple):
    """The arguments of a UNet after latents and timesteps: `unet.apply(v, x, t, *conditioning)`.

    As a pytree it is sliced, joined and put on devices like one array. Stable Diffusion 1.x and 2.x
    have the first field alone; those that are None are not there.

    Attributes:
      prompt_embeds: (b, t, d) states of the text encoder, or of SDXL's two side by side.
      text_embeds: (b, p), SDXL: the second encoder's pooled and projected state.
      time_ids: (b, 6), SDXL: heights and widths in pixels, (original h, w, crop's top, left,
        target h, w).
    """

    prompt_embeds: Any
    text_embeds: Any = None
    time_ids: Any = None


def per_row(values: Shaped[Any, "b"], dimensions: int) -> Any:
    """One value a row, as an array of so many dimensions: (b, 1, ...)."""
    return values.reshape(-1, *[1] * (dimensions - 1))


def where(mask: Bool[Any, "b"], given: Conditioning, otherwise: Conditioning) -> Conditioning:
    """Row by row `given` where the mask is set, else `otherwise`; one of them may have no rows."""

    def choose(x: Any, y: Any) -> Any:
        return jnp.where(per_row(mask, max(x.ndim, y.ndim)), x, y)

    return jax.tree.map(choose, given, otherwise)
