"""The sum of what is largest in each expert's change."""

import numpy as np
from jaxtyping import Float

from safetydpo_jax.merge.layer import Layer, Method
from safetydpo_jax.merge.sparsify import by_magnitude


def change(layer: Layer, *, density: float = 0.2) -> Float[np.ndarray, "in out"]:
    """The sum of the largest `density` of the entries of each."""
    return sum(by_magnitude(x, density) for x in layer.deltas())  # pyright: ignore[reportReturnType]


METHOD = Method(change)
