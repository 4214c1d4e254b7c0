"""How much experts have in common, layer by layer, without a matrix of a layer's size."""

import numpy as np
from jaxtyping import Float

from safetydpo_jax.merge.factors import inner
from safetydpo_jax.merge.layer import Layer


def inner_products(layer: Layer) -> Float[np.ndarray, "experts experts"]:
    """Frobenius inner products of the experts' changes; 0 where one leaves the layer alone.

    Summed over layers and normalised by `cosines` they say how alike two experts are.
    """
    n = len(layer.experts)
    found = np.zeros((n, n))
    for i, x in enumerate(layer.experts):
        for j, y in enumerate(layer.experts[: i + 1]):
            if x is not None and y is not None:
                found[i, j] = found[j, i] = inner(x, y)
    return found


def cosines(products: Float[np.ndarray, "experts experts"]) -> Float[np.ndarray, "experts experts"]:
    """Of inner products; 0 beside a change that is 0."""
    norms = np.sqrt(np.maximum(np.diag(products), 0))
    scale = np.outer(norms, norms)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
