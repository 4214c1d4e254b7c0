"""DARE, then TIES's election: entries are dropped at random, not by size."""

import numpy as np
from jaxtyping import Float

from safetydpo_jax.merge.consensus import agreeing_mean
from safetydpo_jax.merge.layer import Layer, Method
from safetydpo_jax.merge.methods.dare import dropped


def change(layer: Layer, *, density: float = 0.2) -> Float[np.ndarray, "in out"]:
    """The agreeing mean of what is left."""
    return agreeing_mean(dropped(layer, density))


METHOD = Method(change)
