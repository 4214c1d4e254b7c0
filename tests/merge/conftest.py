"""Three experts of the small checkpoint: other ranks, and one without some of the layers."""

import pathlib
import shutil

import numpy as np
import pytest
from flax import traverse_util

from safetydpo_jax import lora
from safetydpo_jax.lora.adapters import kernels

CATEGORIES = ("hate", "violence", "shocking")
RANKS = (2, 4, 3)


def write_expert(path, pipeline, seed, rank, targets, **header):
    rng = np.random.default_rng(seed)
    places, flat = kernels(pipeline.unet_params), {}
    for layer in lora.module_paths(pipeline.unet_params, targets):
        module, kernel = places[layer]
        flat[(*module, "a")] = rng.normal(size=(*kernel[:-1], rank)).astype(np.float32)
        flat[(*module, "b")] = 0.1 * rng.normal(size=(rank, kernel[-1])).astype(np.float32)
    return lora.save_lora(path, traverse_util.unflatten_dict(flat), header)


@pytest.fixture(scope="session")
def kept_files(pipeline, tmp_path_factory):
    """Only to be read."""
    folder = tmp_path_factory.mktemp("experts")
    targets = [("to_q", "to_v", "conv1"), ("to_q", "to_v", "conv1"), ("to_q", "conv1")]
    return [
        write_expert(folder / f"{name}.safetensors", pipeline, i, rank, t, category=name)
        for i, (name, rank, t) in enumerate(zip(CATEGORIES, RANKS, targets, strict=True))
    ]


@pytest.fixture
def files(kept_files, tmp_path):
    """Copies, which a test may damage."""
    (tmp_path / "experts").mkdir()
    return [pathlib.Path(shutil.copy(file, tmp_path / "experts")) for file in kept_files]


@pytest.fixture(scope="session")
def twins(pipeline, tmp_path_factory):
    """Two experts of one rank and the same layers."""
    folder = tmp_path_factory.mktemp("twins")
    return [
        write_expert(folder / f"twin{i}.safetensors", pipeline, 10 + i, 3, ("to_q", "to_v"))
        for i in range(2)
    ]
