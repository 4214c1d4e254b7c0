"""DARE: drop entries at random, scale up the rest, add. Yu et al. 2023, arXiv 2311.03099."""

import zlib

import numpy as np
from jaxtyping import Float

from safetydpo_jax.merge.layer import Layer, Method
from safetydpo_jax.merge.sparsify import at_random


def dropped(layer: Layer, density: float) -> list[Float[np.ndarray, "in out"]]:
    """Each expert's change with so much of its entries left, by a mask of its own."""
    rng = np.random.default_rng([layer.seed, zlib.crc32(layer.name.encode())])
    return [at_random(x, density, rng) for x in layer.deltas()]


def change(layer: Layer, *, density: float = 0.2) -> Float[np.ndarray, "in out"]:
    """The sum of what is left."""
    return sum(dropped(layer, density))  # pyright: ignore[reportReturnType]


METHOD = Method(change)
