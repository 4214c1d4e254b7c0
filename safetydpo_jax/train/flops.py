"""What a training step costs, by the convention of model FLOPs: its matrix products, each once."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
from ml_collections import ConfigDict

from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.models.target import compiling_for
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
    to activations for each part of the loss (the base is frozen, so its weights have none; of
    attention's products both operands have one), and of the anchor's reference over the pairs'
    rows. With tables of the base's answers neither is there. The adapters' own are left
    out: a thousandth of Stable Diffusion's, 2 % of the embedded model's. What is computed again to
    save memory counts once, so that the rate over a device's peak is the model FLOPs utilisation
    (MFU) of the PaLM paper, appendix B, arXiv 2204.02311.

    Args:
      unet: called as `unet.apply({"params"}, latents, timesteps, *conditioning)`.
      params: its weights, or their shapes.
      latent_shape: (h, w, c) of a row.
      null: conditioning of no rows, for its shapes.
      config: from `settings.resolve`.
    """
    pairs = 2 * config.batch_size
    rows = pairs + config.preserve_batch_size
    with compiling_for("any"):  # as it is written: Winograd's convolutions have fewer products
        # Of one row: of a pod's, what is taken in parts would be traced in thousands.
        of_one = product_flops(
            unet.apply,
            {"params": params},
            jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            *jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), null),
        )
    forward = Products(*(rows * flops for flops in of_one))
    anchor = pairs / rows if config.loss.winner_anchor > 0 else 0
    parts = len(part_names(config))
    passes = 1 if config.reference.draws else 2 + anchor
    return config.accumulation * (passes * sum(forward) + parts * forward.backward)


class Products(NamedTuple):
    """FLOPs: of activations with weights, and, as in attention, of activations with each other."""

    of_weights: float
    of_activations: float

    @property
    def backward(self) -> float:
        """FLOPs of the gradient with respect to activations."""
        return self.of_weights + 2 * self.of_activations


def product_flops(f: Callable[..., Any], *args: Any) -> Products:
    """FLOPs of the matrix products and convolutions in f(*args), which is traced but not run.

    Those over batch dimensions of both operands are taken to be of activations with each other.

    A loop's body counts as often as it runs, unlike in XLA's own analysis, and of branches the
    dearest counts. Taps of a convolution that fall on its padding are counted, as is usual.
    Kernels of Pallas and cuDNN are not seen: they have to be a branch beside one that is.
    """
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def _count(jaxpr: Any) -> Products:
    of_weights = of_activations = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            flops = 2.0 * eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contracted)
            of_weights += 0 if batch else flops
            of_activations += flops if batch else 0
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            of_weights += 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs
        else:
            within = list(map(_count, jax.extend.core.jaxprs_in_params(eqn.params)))
            if name == "cond":
                within = [max(within, key=sum)]
            times = eqn.params["length"] if name == "scan" else 1
            of_weights += times * sum(x.of_weights for x in within)
            of_activations += times * sum(x.of_activations for x in within)
    return Products(of_weights, of_activations)
