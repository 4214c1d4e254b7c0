"""A Stable Diffusion checkpoint of a few thousand random numbers, and adapters for its UNet."""

import jax
import pytest

from safetydpo_jax import lora
from safetydpo_jax.models.pretrained import load_pipeline
from tests.diffusion.tiny_pipeline import write_tiny_pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pipeline(model_folder):
    return load_pipeline(model_folder)


@pytest.fixture(scope="session")
def adapters(pipeline):
    """Rank 4, b not zero."""
    adapters = lora.init_adapters(jax.random.key(0), pipeline.unet_params, rank=4, targets=TARGETS)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)
