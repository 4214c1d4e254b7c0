"""The mean of the experts' changes."""

import numpy as np

from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer, Method


def change(layer: Layer) -> Factors:
    """Their sum over their number, those that leave the layer alone counted."""
    a, b = layer.total
    return Factors(a, b / np.float32(len(layer.experts)))


METHOD = Method(change)
