"""An expert for SDXL: two text encoders, pooled text and sizes, from the pairs to diffusers."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from configs import common
from safetydpo_jax import data, lora
from safetydpo_jax.diffusion import initial_latents, make_sampler
from safetydpo_jax.models.pretrained import load_pipeline, save_pipeline
from safetydpo_jax.train import loop
from safetydpo_jax.train.expert import LORA_FILE
from tests.diffusion.tiny_pipeline import write_tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red dog", "two cats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def ours(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("negative", ["", "a cat"])
def test_prompts_are_told_as_pytorch_does(negative, ours, theirs):
    wanted = theirs.encode_prompt(PROMPTS, negative_prompt=[negative] * 2 if negative else None)
    sizes = theirs._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 8)
    told, avoided = ours.encode_prompts(PROMPTS), ours.encode_negative([negative] * 2)
    got = told.prompt_embeds, avoided.prompt_embeds, told.text_embeds, avoided.text_embeds
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y.detach().numpy(), rtol=0, atol=1e-5)
    assert np.any(avoided.prompt_embeds) == np.any(avoided.text_embeds) == bool(negative)
    for conditioning in (told, avoided):
        np.testing.assert_array_equal(conditioning.time_ids, np.repeat(sizes.numpy(), 2, 0))


def test_an_expert_is_trained_and_drawn_by_diffusers(folder, ours, theirs, pairs_folder, tmp_path):
    config = common.get_config("hate", "sdxl")
    config.update_from_flattened_dict(
        {"model": str(folder), "pairs.path": str(pairs_folder), "steps": 3, "batch_size": 8}
        | {"accumulation": 2, "recipe": "anchored", "preserve_batch_size": 8, "lora.rank": 2}
        | {"optimizer.learning_rate": 0.1, "checkpoint.every": 2}
    )
    loop.run(config, tmp_path, lambda line: None)
    cache = data.Cache(tmp_path / "cache")
    told = cache.read(np.arange(5))[1]
    assert [x.shape for x in told] == [(5, 12, 32), (5, 8), (5, 6)]
    assert told.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 5
    assert not np.any(cache.null.prompt_embeds)
    assert cache.null.time_ids.tolist() == [16, 16, 0, 0, 16, 16]

    file = tmp_path / "export" / LORA_FILE
    adapters, header = lora.load_lora(file, ours.unet_params)
    assert header["steps"] == "3"
    noise = initial_latents([4, 9], ours.latent_shape)
    sample = make_sampler(
        ours.unet, ours.schedule, sampler="euler", num_steps=4, guidance_scale=3.0
    )
    told = ours.encode_prompts(PROMPTS), ours.encode_negative([""] * 2)
    base, adapted = (
        np.asarray(sample(ours.unet_params, lora, noise, *told)) for lora in (None, adapters)
    )
    for name in (file, tmp_path / "export" / "comfyui" / "safetydpo_hate.safetensors"):
        theirs.load_lora_weights(name)
        wanted = theirs(
            PROMPTS,
            latents=torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="latent",
        ).images.permute(0, 2, 3, 1)
        theirs.unload_lora_weights()
        scale = np.abs(wanted.numpy()).max()
        assert np.abs(adapted - wanted.numpy()).max() < 1e-3 * scale
        assert np.abs(base - wanted.numpy()).max() > 0.05 * scale


def test_the_size_of_a_picture_is_that_of_the_cache(ours, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 20, 3), np.uint8)
    pictures = [data.Picture(f"{i}", "a word", i, x) for i, x in enumerate(pixels)]
    data.write_pairs(tmp_path / "pairs", pictures[:1], pictures[1:2], pictures[2:], {})
    config = common.get_config("hate", "sdxl")
    config.cache.flip = False
    config.cache.resolution = 20
    cache = data.make_cache(config, ours, tmp_path, lambda line: None)
    sizes = [20, 20, 0, 0, 20, 20]
    assert cache.read(np.arange(3))[1].time_ids.tolist() == [sizes] * 3
    assert cache.null.time_ids.tolist() == sizes
    key = cache.key
    index = ours.configs["model_index"]
    ours.configs["model_index"] = index | {"force_zeros_for_empty_prompt": False}
    try:
        cache = data.make_cache(config, ours, tmp_path, lambda line: None)
    finally:
        ours.configs["model_index"] = index
    assert cache.key != key
    assert np.any(cache.null.prompt_embeds)


def test_written_and_read_again(folder, ours, tmp_path):
    save_pipeline(ours, tmp_path)
    again = load_pipeline(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    assert again.configs == ours.configs
    assert again.encode_prompts(PROMPTS)[1].shape == (2, 8)
