"""How much experts have in common, layer by layer, without a matrix of a layer's size."""

import numpy as np
from jaxtyping import Float

from safetydpo_jax.merge.factors import Factors, inner
from safetydpo_jax.merge.layer import Layer

TINY = 1e-6  # singular values below this share of the first are rounding
Pairs = Float[np.ndarray, "experts experts"]


class Overlap:
    """Added up over layers: how alike the experts' changes are, and what they act on.

    Args:
      count: of experts.
    """

    def __init__(self, count: int):
        self._products = np.zeros((count, count))
        self._shared, self._layers = np.zeros((count, count)), np.zeros((count, count))

    def add(self, layer: Layer) -> None:
        """With one more layer; an expert that leaves it alone has nothing in common there."""
        present = [(i, x, _directions(x)) for i, x in enumerate(layer.experts) if x is not None]
        for n, (i, x, one) in enumerate(present):
            for j, y, other in present[: n + 1]:
                product = inner(x, y)
                angles = np.square(one.T @ other).sum() / max(min(one.shape[1], other.shape[1]), 1)
                for place in {(i, j), (j, i)}:
                    self._products[place] += product
                    self._shared[place] += angles
                    self._layers[place] += 1

    @property
    def cosines(self) -> Pairs:
        """Of the changes as one vector over all layers; 0 beside a change that is 0."""
        norms = np.sqrt(np.maximum(np.diag(self._products), 0))
        return _divided(self._products, np.outer(norms, norms))

    @property
    def shared(self) -> Pairs:
        """How much of the smaller space of outputs that two reach lies in the other's, 0 to 1.

        The squared cosines of the principal angles, mean over them and over layers; of random
        spaces it is the larger rank over the layer's outputs.
        """
        return _divided(self._shared, self._layers)


def _directions(factors: Factors) -> Float[np.ndarray, "out k"]:
    """An orthonormal basis of the outputs that a change reaches."""
    left, singular, _ = np.linalg.svd(np.asarray(factors.b, np.float64).T, full_matrices=False)
    return left[:, singular > TINY * singular.max(initial=0.0)]


def _divided(x: Pairs, by: Pairs) -> Pairs:
    return np.divide(x, by, out=np.zeros_like(x), where=by > 0)
