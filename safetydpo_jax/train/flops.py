"""What a training step costs, by the convention of model FLOPs: its matrix products, each once."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
from ml_collections import ConfigDict

from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.train.step import part_names


def step_flops(
    unet: nn.Module,
    params: Any,
    latent_shape: tuple[int, ...],
    null: Conditioning,
    config: ConfigDict,
) -> float:
    """FLOPs of the products that one step needs, over all devices.

    Those of the policy's and the reference's forward pass over all rows, of a gradient with respect
    to activations for each part of the loss (the base is frozen, so its weights have none), and of
    the anchor's reference over the pairs' rows. The adapters' own are left out: a thousandth. What
    is computed again to save memory counts once, so that the rate over a device's peak is the model
    FLOPs utilisation (MFU) of the PaLM paper, appendix B, arXiv 2204.02311.

    Args:
      unet: called as `unet.apply({"params"}, latents, timesteps, *conditioning)`.
      params: its weights, or their shapes.
      latent_shape: (h, w, c) of a row.
      null: conditioning of no rows, for its shapes.
      config: from `settings.resolve`.
    """
    pairs = 2 * config.batch_size
    rows = pairs + config.preserve_batch_size
    forward = product_flops(
        unet.apply,
        {"params": params},
        jax.ShapeDtypeStruct((rows, *latent_shape), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        *jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), null),
    )
    passes = 2 + len(part_names(config))
    anchor = pairs / rows if config.loss.winner_anchor > 0 else 0
    return config.accumulation * (passes + anchor) * forward


def product_flops(f: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matrix products and convolutions in f(*args), which is traced but not run.

    A loop's body counts as often as it runs, unlike in XLA's own analysis, and of branches the
    dearest counts. Taps of a convolution that fall on its padding are counted, as is usual.
    Kernels of Pallas and cuDNN are not seen: they have to be a branch beside one that is.
    """
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(map(_count, jax.extend.core.jaxprs_in_params(eqn.params)))
    return total
