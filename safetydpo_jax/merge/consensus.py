"""How several changes of one layer become one, entry by entry."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def agreeing_mean(changes: Sequence[Float[np.ndarray, "*shape"]]) -> Float[np.ndarray, "*shape"]:
    """Where signs differ the sign of the sum wins; the mean of what has it, zeros left out.

    TIES's election and disjoint mean: Yadav et al. 2023, arXiv 2306.01708, sections 3.2 and 3.3.
    """
    total = np.sum(changes, axis=0, dtype=np.float64)
    summed, count = np.zeros_like(total), np.zeros(total.shape, np.int32)
    for x in changes:
        agrees = x * np.sign(total) > 0
        summed += np.where(agrees, x, 0)
        count += agrees
    return (summed / np.maximum(count, 1)).astype(changes[0].dtype)
