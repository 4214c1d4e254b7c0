"""Co-Merge in which votes share: every output's change is the experts' mean, weighted by votes."""

import numpy as np

from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer, Method
from safetydpo_jax.merge.methods.co_merge import masked


def change(layer: Layer, *, sharpness: float = 1.0) -> Factors:
    """Shares are votes to the power of `sharpness`: 0 is the mean, very large is Co-Merge."""
    votes = layer.counted().outputs.astype(np.float64)
    shares = (votes / np.maximum(votes.max(0), 1)) ** sharpness
    return masked(layer, shares / np.maximum(shares.sum(0), 1e-300))


METHOD = Method(change, needs="votes")
