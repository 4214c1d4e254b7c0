"""How much experts have in common, layer by layer, without a matrix of a layer's size."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

from safetydpo_jax.merge.layer import Layer

TINY = 1e-6  # singular values below this share of the first are rounding
Pairs = Float[np.ndarray, "experts experts"]


class Common(NamedTuple):
    """What every two experts have in common in one layer, nothing where one leaves it alone.

    Attributes:
      products: the inner products of their changes.
      shared: the squared cosines of the principal angles between the outputs they reach, a mean.
      both: 1 where both change the layer.
    """

    products: Pairs
    shared: Pairs
    both: Pairs


def common(layer: Layer) -> Common:
    """From the factors' inner products alone, as of A the ones of A^T A."""
    count = len(layer.experts)
    found = Common(*(np.zeros((count, count)) for _ in Common._fields))
    here = [i for i, x in enumerate(layer.experts) if x is not None]
    a, b = (np.asarray(x, np.float64) for x in layer.total)
    left, right = a.T @ a, b @ b.T
    ends = np.cumsum([x.rank for x in layer.present])
    parts = [slice(end - x.rank, end) for end, x in zip(ends, layer.present, strict=True)]
    whitened = [_whitening(right[part, part]) for part in parts]
    for i, one, w in zip(here, parts, whitened, strict=True):
        for j, other, v in zip(here, parts, whitened, strict=True):
            found.products[i, j] = (left[one, other] * right[one, other]).sum()
            cosines = w.T @ right[one, other] @ v
            found.shared[i, j] = np.square(cosines).sum() / max(min(cosines.shape), 1)
            found.both[i, j] = 1
    return found


class Overlap:
    """Added up over layers: how alike the experts' changes are, and what they act on.

    Args:
      count: of experts.
    """

    def __init__(self, count: int):
        self._sums = Common(*(np.zeros((count, count)) for _ in Common._fields))

    def add(self, layer: Common) -> None:
        """With one more layer."""
        self._sums = Common(*map(np.add, self._sums, layer))

    @property
    def cosines(self) -> Pairs:
        """Of the changes as one vector over all layers; 0 beside a change that is 0."""
        norms = np.sqrt(np.maximum(np.diag(self._sums.products), 0))
        return _divided(self._sums.products, np.outer(norms, norms))

    @property
    def shared(self) -> Pairs:
        """How much of the smaller space of outputs that two reach lies in the other's, 0 to 1.

        The squared cosines of the principal angles, mean over them and over layers; of random
        spaces it is the larger rank over the layer's outputs.
        """
        return _divided(self._sums.shared, self._sums.both)


def _whitening(gram: Float[np.ndarray, "rank rank"]) -> Float[np.ndarray, "rank k"]:
    """W such that W^T b has orthonormal rows that span those of b, whose b b^T is given."""
    values, vectors = scipy.linalg.eigh(gram, check_finite=False)
    kept = values > TINY**2 * values.max(initial=0.0)
    return vectors[:, kept] / np.sqrt(values[kept])


def _divided(x: Pairs, by: Pairs) -> Pairs:
    return np.divide(x, by, out=np.zeros_like(x), where=by > 0)
