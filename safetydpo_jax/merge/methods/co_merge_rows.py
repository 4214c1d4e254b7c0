"""Co-Merge to the letter: the rows of A and of B, as PyTorch has them, each from their winner.

A's rows are the rank's units, B's the outputs. Unit i of one expert has nothing to do with unit i
of another unless they began from the same A, as experts here do that share a seed.
"""

import numpy as np

from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer, Method


def change(layer: Layer) -> Factors:
    """The experts' rank again.

    Raises:
      UserError: the experts' ranks differ, or one leaves the layer alone.
    """
    votes, experts = layer.counted(), layer.present
    if votes.ranks is None or len(experts) < len(layer.experts):
        raise UserError(
            f"{layer.name}: co_merge_rows takes rows from experts of one rank and the same layers: "
            "use co_merge for these"
        )
    by_unit, by_output = votes.ranks.argmax(0), votes.outputs.argmax(0)
    a, b = (np.stack(x) for x in zip(*experts, strict=True))
    units, outputs = np.arange(len(by_unit)), np.arange(len(by_output))
    return Factors(a[by_unit, :, units].T, b[by_output, :, outputs].T)


METHOD = Method(change, needs="votes", one_rank=True)
