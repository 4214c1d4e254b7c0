import shutil
from pathlib import Path

import diffusers
import pytest

from tests.models import torch_models


@pytest.fixture(scope="session")
def torch_pipeline(tmp_path_factory) -> diffusers.StableDiffusionPipeline:
    """A small Stable Diffusion in PyTorch with random weights."""
    return torch_models.torch_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def saved_pipeline(torch_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved_pipeline, tmp_path) -> Path:
    """A copy of the PyTorch pipeline's folder that a test may change."""
    return Path(shutil.copytree(saved_pipeline, tmp_path / "checkpoint"))
