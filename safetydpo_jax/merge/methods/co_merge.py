"""Co-Merge: each output of a layer goes to the expert that is most often the most active there.

SafetyDPO (AlignGuard, arXiv 2412.10493) describes it and its code is not public. This is the
reading in which the activation of output j by expert e is |(x a_e b_e)_j|.
"""

import numpy as np
from jaxtyping import Float

from safetydpo_jax.merge.factors import Factors, stack
from safetydpo_jax.merge.layer import Layer, Method


def masked(layer: Layer, shares: Float[np.ndarray, "experts out"]) -> Factors:
    """The sum of the experts' changes, each output's by its share; exactly."""
    return stack(
        [
            Factors(x.a, x.b * share.astype(np.float32))
            for x, share in zip(layer.experts, shares, strict=True)
            if x is not None
        ]
    )


def change(layer: Layer) -> Factors:
    """Every output from its winner; the first of equals."""
    votes = layer.counted().outputs
    won = np.arange(len(votes))[:, None] == votes.argmax(0)
    return masked(layer, won.astype(np.float32))


METHOD = Method(change, needs="votes")
