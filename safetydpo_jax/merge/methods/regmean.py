"""RegMean: the change that does on each category's inputs what its expert does, by least squares.

Jin et al. 2022, Dataless Knowledge Fusion, arXiv 2212.09849, for whole weights. Here it is for what
experts add, with a term for harmless inputs, on which nothing is to be added. The rank is cut where
that costs the least on these inputs.
"""

import numpy as np
import scipy.linalg

from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer, Method, Whitened


def change(layer: Layer, *, preservation: float = 1.0, ridge: float = 1e-3) -> Whitened:
    """argmin_D of sum_e |X_e (D - a_e b_e)|^2 + preservation |X_safe D|^2 + ridge |D|^2.

    Args:
      layer: with its inputs.
      preservation: how much harmless inputs count beside those of all categories.
      ridge: what is added to the diagonal of the moments, as a share of its mean.

    Raises:
      UserError: no inputs of this layer, or too few with so small a ridge.
    """
    inputs = layer.seen()
    moments = np.asarray(inputs.harmful, np.float64) + preservation * inputs.harmless
    mean = moments.trace() / len(moments)
    moments[np.diag_indices_from(moments)] += ridge * mean if mean > 0 else 1.0
    try:
        root = scipy.linalg.cholesky(moments, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise UserError(
            f"{layer.name}: the inputs are of fewer directions than the layer has: give more "
            f"prompts, or a ridge above {ridge:g}"
        ) from None
    pairs = [
        (image, factors.b)
        for image, factors in zip(inputs.images, layer.experts, strict=True)
        if image is not None and factors is not None
    ]
    # D = moments^-1 sum_e X_e^T X_e a_e b_e, so L^T D = L^-1 of that sum.
    images = np.concatenate([np.asarray(image, np.float64) for image, _ in pairs], 1)
    left = scipy.linalg.solve_triangular(root, images, lower=True, check_finite=False)
    return Whitened(Factors(left, np.concatenate([b for _, b in pairs])), root)


METHOD = Method(change, needs="inputs")
