"""Every published config.json gives PyTorch's very parameters, by name, shape and number."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from safetydpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from safetydpo_jax.models.checkpoint import param_shapes
from safetydpo_jax.models.state_dict import torch_key
from safetydpo_jax.models.text_encoder import CLIPTextConfig, CLIPTextModel
from safetydpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.torch_models import config

VAE_MILLIONS = 83.7


@pytest.mark.parametrize(
    ("checkpoint", "text_encoder", "unet_millions", "text_millions"),
    [
        ("sd15", "text_encoder", 859.5, 123.1),
        ("sd21-base", "text_encoder", 865.9, 340.4),
        ("sd21-768", "text_encoder", 865.9, 340.4),
        ("sdxl", "text_encoder", 2567.5, 123.1),
        ("sdxl", "text_encoder_2", 2567.5, 694.7),
    ],
)
def test_parameters(checkpoint, text_encoder, unet_millions, text_millions):
    configs = [config(checkpoint, name) for name in ("unet", "vae", text_encoder)]
    ours = (
        UNet2DConditionModel(UNetConfig.from_dict(configs[0])),
        AutoencoderKL(AutoencoderConfig.from_dict(configs[1])),
        CLIPTextModel(CLIPTextConfig.from_dict(configs[2])),
    )
    text_model = getattr(transformers, configs[2]["architectures"][0])
    with torch.device("meta"):
        theirs = (
            diffusers.UNet2DConditionModel.from_config(configs[0]),
            diffusers.AutoencoderKL.from_config(configs[1]),
            text_model(transformers.CLIPTextConfig(**configs[2])),
        )
    sizes = (unet_millions, VAE_MILLIONS, text_millions)
    found = param_shapes(dict(zip(("unet", "vae", "text_encoder"), ours, strict=True))).values()
    for shapes, torch_module, millions in zip(found, theirs, sizes, strict=True):
        got = {_plain(torch_key(p)): sorted(x.shape) for p, x in flatten_dict(shapes).items()}
        state = torch_module.state_dict().items()
        assert got == {_plain(key): sorted(x.shape) for key, x in state}
        assert sum(map(np.prod, got.values())) / 1e6 == pytest.approx(millions, abs=0.06)


def _plain(key: str) -> str:
    """transformers 5 writes one of its two text encoders without this prefix."""
    return key.removeprefix("text_model.")
