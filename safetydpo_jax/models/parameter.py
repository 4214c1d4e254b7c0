"""A module's parameters."""

from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array


def parameter(
    module: nn.Module, name: str, initializer: Callable[..., Any], shape: tuple[int, ...]
) -> Array:
    """`module.param` in float32; one that is there, a plain array, is not traced anew.

    Flax compares the shape of what is there with that of a traced initialiser, which took a quarter
    of the time to trace the UNet.

    Raises:
      ScopeParamShapeError: what is there has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, initializer, shape, jnp.float32)
    found: Array = module.get_variable("params", name)
    if jnp.shape(found) != shape:
        where = "/".join(module.path)
        raise flax.errors.ScopeParamShapeError(name, where, jnp.shape(found), shape)
    return found
