"""The Flax networks against diffusers and transformers, on the same random weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from safetydpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from safetydpo_jax.models.state_dict import find_weights, load_params
from safetydpo_jax.models.text_encoder import CLIPTextConfig, CLIPTextModel
from safetydpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from tests.models import torch_models

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def variables(torch_model, folder, module, *inputs, **kwargs):
    """Flax variables by way of the files that PyTorch writes."""
    torch_model.save_pretrained(folder)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))
    return {"params": load_params(find_weights(folder), shapes["params"], jnp.float32)}


def to_torch(x: np.ndarray) -> torch.Tensor:
    """NHWC to NCHW, for pictures and latents."""
    return torch.from_numpy(x.transpose(0, 3, 1, 2))


def assert_close(got, wanted: torch.Tensor):
    wanted = wanted.detach().numpy()
    if wanted.ndim == 4:
        wanted = wanted.transpose(0, 2, 3, 1)
    assert got.shape == wanted.shape
    error = np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()
    assert error <= TOLERANCE, f"relative error {error:.1e}"


# 12 x 20 is halved to odd sizes on the way down, which must be met again on the way up.
@pytest.mark.parametrize(
    ("checkpoint", "size"),
    [("sd15", (12, 20)), ("sd21-base", (16, 16)), ("sdxl", (16, 8))],
)
def test_unet(checkpoint, size, rng, tmp_path):
    config = UNetConfig.from_dict(torch_models.unet_config(checkpoint))
    latents = rng.normal(size=(2, *size, 4)).astype(np.float32)
    timesteps = np.array([3, 981])
    embeds = rng.normal(size=(2, 7, 48)).astype(np.float32)
    added = {}
    if checkpoint == "sdxl":
        text = rng.normal(size=(2, 24)).astype(np.float32)
        added = {"text_embeds": text, "time_ids": np.array([[1024, 768, 0, 4, 1024, 1024]] * 2)}

    theirs = torch_models.torch_unet(checkpoint)
    with torch.no_grad():
        wanted = theirs(
            to_torch(latents),
            torch.from_numpy(timesteps),
            torch.from_numpy(embeds),
            added_cond_kwargs={k: torch.from_numpy(v) for k, v in added.items()},
        ).sample
    inputs = jax.tree.map(jnp.asarray, (latents, timesteps, embeds, *added.values()))
    ours = UNet2DConditionModel(config)
    assert_close(jax.jit(ours.apply)(variables(theirs, tmp_path, ours, *inputs), *inputs), wanted)


@pytest.mark.parametrize("checkpoint", ["sd15", "sdxl"])
def test_autoencoder(checkpoint, rng, tmp_path):
    ours = AutoencoderKL(AutoencoderConfig.from_dict(torch_models.vae_config(checkpoint)))
    pixels = rng.uniform(-1, 1, size=(2, 32, 24, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 4, 3, 4)).astype(np.float32)

    theirs = torch_models.torch_vae(checkpoint)
    with torch.no_grad():
        moments = theirs.encode(to_torch(pixels)).latent_dist
        decoded = theirs.decode(to_torch(latents)).sample
    params = variables(theirs, tmp_path, ours, jnp.asarray(pixels))
    mean, logvar = jax.jit(lambda x: ours.apply(params, x, method="encode"))(pixels)
    assert_close(mean, moments.mean)
    assert_close(logvar, moments.logvar)
    assert_close(jax.jit(lambda x: ours.apply(params, x, method="decode"))(latents), decoded)


@pytest.mark.parametrize(
    ("checkpoint", "component"),
    [("sd15", "text_encoder"), ("sd21-768", "text_encoder"), ("sdxl", "text_encoder_2")],
)
def test_text_encoder(checkpoint, component, rng, tmp_path):
    ours = CLIPTextModel(CLIPTextConfig.from_dict(torch_models.text_config(checkpoint, component)))
    ids = rng.integers(0, 512, size=(3, 77))
    ids[0, 9:] = 513  # end of text closes the vocabulary; a prompt is padded with it
    ids[1, 40] = 513
    ids[2, -1] = 513

    theirs = torch_models.torch_text_encoder(checkpoint, component)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids), output_hidden_states=True)
    ids = jnp.asarray(ids)
    got = jax.jit(ours.apply)(variables(theirs, tmp_path, ours, ids), ids)
    assert_close(got.last_hidden_state, wanted.last_hidden_state)
    pooled = wanted.text_embeds if component == "text_encoder_2" else wanted.pooler_output
    assert_close(got.pooler_output, pooled)
    assert len(got.hidden_states) == len(wanted.hidden_states)
    for state, wanted_state in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert_close(state, wanted_state)
