"""A Stable Diffusion checkpoint of a few thousand random numbers, and adapters for its UNet."""

import jax
import pytest

from safetydpo_jax import lora

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="session")
def adapters(pipeline):
    """Rank 4, b not zero."""
    adapters = lora.init_adapters(jax.random.key(0), pipeline.unet_params, rank=4, targets=TARGETS)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)
