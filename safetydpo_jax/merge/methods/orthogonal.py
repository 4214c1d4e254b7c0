"""TIES in a shared basis of the outputs, as KnOTS: Stoica et al. 2024, arXiv 2410.19735.

Experts' changes agree little entry by entry, as each has a basis of its own; put side by side and
decomposed by one SVD they share one, and signs can be compared.
"""

import numpy as np

from safetydpo_jax.merge.consensus import agreeing_mean
from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer, Method
from safetydpo_jax.merge.sparsify import by_magnitude

TINY = 1e-7  # singular values below this share of the first are rounding


def change(layer: Layer, *, density: float = 0.2) -> Factors:
    """U S and TIES of the V of [delta_1^T .. delta_n^T] = U S [V_1^T .. V_n^T]."""
    # The Gram matrix over outputs is sum_e b_e^T (a_e^T a_e) b_e = L L^T, L of the ranks' width.
    parts = []
    for factors in layer.present:
        a, b = (np.asarray(x, np.float64) for x in factors)
        r = np.linalg.qr(a, mode="r")
        parts.append((r @ b).T)
    basis, singular, _ = np.linalg.svd(np.concatenate(parts, 1), full_matrices=False)
    kept = singular > TINY * singular[0]
    basis, singular = basis[:, kept], singular[kept]
    if not len(singular):
        return Factors(
            np.zeros((layer.shape[0], 1), np.float32), np.zeros((1, layer.shape[1]), np.float32)
        )
    # (in, k) of each expert: its rows in the shared basis, free of the singular values.
    rows = [
        np.zeros((layer.shape[0], len(singular)))
        if x is None
        else np.asarray(x.a, np.float64) @ (np.asarray(x.b, np.float64) @ (basis / singular))
        for x in layer.experts
    ]
    merged = agreeing_mean([by_magnitude(x, density) for x in rows])
    return Factors(np.asarray(merged, np.float32), np.asarray((basis * singular).T, np.float32))


METHOD = Method(change)
