"""TIES: trim, elect a sign, average what agrees. Yadav et al. 2023, arXiv 2306.01708."""

import numpy as np
from jaxtyping import Float

from safetydpo_jax.merge.consensus import agreeing_mean
from safetydpo_jax.merge.layer import Layer, Method
from safetydpo_jax.merge.sparsify import by_magnitude


def change(layer: Layer, *, density: float = 0.2) -> Float[np.ndarray, "in out"]:
    """The agreeing mean of the largest `density` of the entries of each."""
    return agreeing_mean([by_magnitude(x, density) for x in layer.deltas()])


METHOD = Method(change)
