"""A layer's change as two thin factors, and the cut to a rank; no d x d matrix where none is asked.

All in NumPy: a layer is small, there are hundreds of shapes, and float64 is a word away.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

OVERSAMPLES, POWERS = 16, 2  # of the randomised SVD, Halko et al. 2011, algorithm 4.4
DEPENDENT = 1e-5  # a column whose own part is a smaller share is not told apart by A^T A
SMALL = 512  # a side up to which a matrix is decomposed whole, in tenths of a second


class Factors(NamedTuple):
    """What a LoRA adds to a layer's kernel: a @ b, its scale within.

    A convolution's `a` is flat: (kh * kw * in, rank).
    """

    a: Float[np.ndarray, "in rank"]
    b: Float[np.ndarray, "rank out"]

    @property
    def rank(self) -> int:
        """Of the factors; that of the product may be lower."""
        return len(self.b)

    @property
    def delta(self) -> Float[np.ndarray, "in out"]:
        """The product, in float32."""
        return np.asarray(self.a, np.float32) @ np.asarray(self.b, np.float32)


class Cut(NamedTuple):
    """Factors of a given rank, and what was lost on the way.

    Attributes:
      factors: float32.
      energy: the share of the squared Frobenius norm that is left; 1 where there was nothing.
      error: the most, as a share of the same, that the best factors of that rank could keep beyond
        these; 0 where the cut is exact.
    """

    factors: Factors
    energy: float
    error: float = 0.0


def stack(factors: Sequence[Factors]) -> Factors:
    """The sum of the products, exactly: factors side by side."""
    if len(factors) == 1:
        return factors[0]
    return Factors(
        np.concatenate([f.a for f in factors], 1), np.concatenate([f.b for f in factors], 0)
    )


def balanced(factors: Factors) -> Factors:
    """The same product with each rank unit's two halves of equal norm, float32."""
    a, b = (np.asarray(x, np.float64) for x in factors)
    sides = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
    scale = np.sqrt(np.divide(sides[1], sides[0], out=np.ones_like(sides[0]), where=sides[0] > 0))
    scale[scale == 0] = 1.0
    return Factors(np.asarray(a * scale, np.float32), np.asarray(b / scale[:, None], np.float32))


def cut(factors: Factors, rank: int) -> Cut:
    """The best factors of at most `rank`: the truncated SVD of the product, from thin matrices.

    With A = QR, the squares of the product's singular values are the eigenvalues of R B B^T R^T,
    which has the factors' rank as its side. It is formed in float64, so that what squaring loses
    lies below what float32 holds.

    Args:
      factors: of any rank; of no more than `rank` they are returned as they are.
      rank: at least 1.
    """
    if factors.rank <= rank:
        return Cut(factors, 1.0)
    a, b = (np.asarray(x, np.float64) for x in factors)
    basis, r = _basis(a)
    core = r @ (b @ b.T) @ r.T
    size = len(core)
    values, vectors = scipy.linalg.eigh(
        core, subset_by_index=(max(size - rank, 0), size - 1), driver="evr", check_finite=False
    )
    kept = vectors[:, ::-1]
    return _balanced(basis(kept), (kept.T @ r) @ b, values[::-1], float(np.trace(core)))


def _basis(a: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """(x -> Q x, R) with A = QR; Q is the identity where A has more columns than rows."""
    if a.shape[0] < a.shape[1]:
        return (lambda x: x), a
    try:
        # Four times faster than by reflections; A R^-1 x stands for Q x.
        r: np.ndarray = scipy.linalg.cholesky(a.T @ a, check_finite=False)
        sides = np.diag(r)
        if sides.min() > DEPENDENT * sides.max():
            return (lambda x: a @ scipy.linalg.solve_triangular(r, x, check_finite=False)), r
    except np.linalg.LinAlgError:
        pass  # columns that depend on each other: experts that agree
    q, r = np.linalg.qr(a)
    return q.__matmul__, r


def cut_dense(delta: Float[np.ndarray, "in out"], rank: int, seed: int = 0) -> Cut:
    """Factors of at most `rank` near a whole matrix, of a large one by a randomised SVD.

    Args:
      delta: the matrix, float32.
      rank: at least 1.
      seed: of the random test matrix.
    """
    total = float(np.square(delta, dtype=np.float64).sum())
    if min(delta.shape) <= max(SMALL, rank + OVERSAMPLES):
        left, singular, right = np.linalg.svd(delta, full_matrices=False)
    else:
        basis = _range(delta, rank + OVERSAMPLES, seed)
        left, singular, right = np.linalg.svd(basis.T @ delta, full_matrices=False)
        left = basis @ left
    values = np.square(singular, dtype=np.float64)
    found = _balanced(left[:, :rank], singular[:rank, None] * right[:rank], values[:rank], total)
    # The best ones keep no more than these do and all that lies outside the subspace.
    outside = total - float(values.sum()) if len(singular) < min(delta.shape) else 0.0
    return found._replace(error=max(outside, 0.0) / total if total else 0.0)


def _range(delta: np.ndarray, width: int, seed: int) -> np.ndarray:
    """An orthonormal basis of what is likely nearest to the span of the first singular vectors."""
    rng = np.random.default_rng(seed)
    y = delta @ rng.standard_normal((delta.shape[1], width), np.float32)
    for _ in range(POWERS):
        y = delta @ (delta.T @ np.linalg.qr(y)[0])
    return np.linalg.qr(y)[0]


def _balanced(left: np.ndarray, right: np.ndarray, squares: np.ndarray, total: float) -> Cut:
    """U and S V^T of a product as factors of equal norms: halves of float16 then hold both."""
    roots = np.maximum(squares, 0.0) ** 0.25
    scale = np.where(roots > 0, roots, 1.0)
    factors = Factors(
        np.asarray(left * roots, np.float32), np.asarray(right / scale[:, None], np.float32)
    )
    return Cut(factors, min(float(np.maximum(squares, 0.0).sum()) / total, 1.0) if total else 1.0)
