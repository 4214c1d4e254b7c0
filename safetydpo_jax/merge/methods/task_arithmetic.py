"""The sum of the experts' changes: Ilharco et al. 2022, arXiv 2212.04089."""

from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer, Method


def change(layer: Layer) -> Factors:
    """The sum, exactly."""
    return layer.total


METHOD = Method(change)
