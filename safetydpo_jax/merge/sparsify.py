"""Which entries of a change are kept; what merging TIES and DARE have in common with pruning."""

import numpy as np
from jaxtyping import Float


def by_magnitude(x: Float[np.ndarray, "*shape"], density: float) -> Float[np.ndarray, "*shape"]:
    """The largest `density` of the entries, the rest 0 (TIES: Yadav et al. 2023, arXiv 2306.01708).

    Ties at the threshold are kept.
    """
    kept = max(round(density * x.size), 1)
    if kept >= x.size:
        return x
    size = np.abs(x)
    threshold = np.partition(size, x.size - kept, axis=None)[x.size - kept]
    return np.where(size >= threshold, x, 0)


def at_random(
    x: Float[np.ndarray, "*shape"], density: float, rng: np.random.Generator
) -> Float[np.ndarray, "*shape"]:
    """Each entry with probability `density`, divided by it (DARE: Yu et al., arXiv 2311.03099).

    So the expectation stays.
    """
    kept = rng.random(x.shape, np.float32) < density
    return np.where(kept, x / x.dtype.type(density), 0)
