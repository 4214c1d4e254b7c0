"""LoRAs of other tools, judged by what PyTorch makes of them."""

import json
import os
import types
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from flax import traverse_util

import safetydpo_jax
from configs import common
from safetydpo_jax import lora
from safetydpo_jax.lora.adapters import kernels
from safetydpo_jax.lora.keys import KeyReader
from safetydpo_jax.models.original_layout import original_unet_names
from safetydpo_jax.models.unet import UNet2DConditionModel, UNetConfig

PUBLISHED = Path(safetydpo_jax.__file__).parent / "models" / "published"
# Layers of every kind, each with a rank of its own.
RANKS = {
    "to_q": 3,
    r"attn2\.to_out\.0": 4,
    r"ff\.net\.0\.proj": 2,
    "proj_in": 2,
    "conv1": 4,
    r"downsamplers\.0\.conv": 2,
    "time_emb_proj": 3,
}


@pytest.fixture(scope="module")
def mixed(pipeline):
    """Adapters on those layers, none of them zero, ready to apply."""
    flat, rng = {}, np.random.default_rng(0)
    for target, rank in RANKS.items():
        found = lora.init_adapters(
            jax.random.key(0), pipeline.unet_params, rank=rank, targets=[target]
        )
        flat |= traverse_util.flatten_dict(found)
    noise = {path: rng.normal(size=leaf.shape, scale=0.3) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in noise.items()})


@pytest.fixture
def inputs():
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    return latents, np.array([10, 700]), rng.normal(size=(2, 12, 16)).astype(np.float32)


def ours(pipeline, inputs, adapters=None):
    variables = {"params": pipeline.unet_params} | ({"lora": adapters} if adapters else {})
    return jax.jit(pipeline.unet.apply)(variables, *inputs)


def theirs(unet, inputs):
    latents, timesteps, embeds = map(torch.tensor, inputs)
    with torch.no_grad():
        answer = unet(latents.permute(0, 3, 1, 2), timesteps, embeds, return_dict=False)[0]
    return answer.permute(0, 2, 3, 1).numpy()


def assert_same(found, wanted):
    found, wanted = traverse_util.flatten_dict(found), traverse_util.flatten_dict(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=".".join(path))


def test_diffusers_draws_the_same_with_every_kind_of_layer(
    mixed, pipeline, model_folder, inputs, tmp_path
):
    file = lora.save_lora(tmp_path / "mixed.safetensors", mixed)
    found, _ = lora.load_lora(file, pipeline.unet_params)
    assert_same(found, mixed)
    wanted = ours(pipeline, inputs, mixed)
    assert np.abs(wanted - ours(pipeline, inputs)).max() > 0.05
    torch_pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model_folder)
    torch_pipeline.load_lora_weights(file)
    np.testing.assert_allclose(theirs(torch_pipeline.unet, inputs), wanted, atol=1e-4)


def test_peft_draws_the_same_with_every_kind_of_layer(
    mixed, pipeline, model_folder, inputs, tmp_path
):
    file = lora.save_peft(tmp_path / "peft", mixed, {"category": "hate"})
    found, header = lora.load_lora(file, pipeline.unet_params)
    assert_same(found, mixed)
    assert header["category"] == "hate"
    unet = diffusers.UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    wanted = ours(pipeline, inputs, mixed)
    assert np.abs(wanted - theirs(unet, inputs)).max() > 0.05
    adapted = peft.PeftModel.from_pretrained(unet, tmp_path / "peft")
    np.testing.assert_allclose(theirs(adapted, inputs), wanted, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft(rslora, pipeline, model_folder, inputs, tmp_path):
    """A peft adapter of two ranks and three alphas gives what peft itself gives."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "conv1", "ff.net.0.proj"],
        rank_pattern={"conv1": 2},
        alpha_pattern={"conv1": 8, "attn2.to_v": 1},
        init_lora_weights=False,
        use_rslora=rslora,
    )
    model = peft.get_peft_model(unet, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    found, _ = lora.load_lora(tmp_path / "adapter_model.safetensors", pipeline.unet_params)
    wanted = theirs(model, inputs)
    assert np.abs(wanted - ours(pipeline, inputs)).max() > 0.05
    np.testing.assert_allclose(ours(pipeline, inputs, found), wanted, atol=1e-4)


@pytest.mark.parametrize("original", [False, True])
def test_kohya(original, mixed, pipeline, tmp_path):
    """Half an alpha and twice a B, under diffusers' names or the original ones, is no change."""
    file = lora.save_kohya(tmp_path / "kohya.safetensors", mixed)
    names = {}
    if original:
        layers = [
            ".".join(path[:-1])
            for path in traverse_util.flatten_dict(pipeline.unet_params)
            if path[-1] == "kernel"
        ]
        names = {k.replace(".", "_"): v for k, v in original_unet_names(layers).items()}
    tensors = {}
    for key, tensor in safetensors.numpy.load_file(file).items():
        layer, what = key.removeprefix("lora_unet_").split(".", 1)
        factor = {"alpha": 0.5, "lora_up.weight": 2.0}.get(what, 1.0)
        layer = names.get(layer, layer).replace(".", "_")
        tensors[f"lora_unet_{layer}.{what}"] = np.asarray(factor * tensor, np.float32)
    assert any("input_blocks" in key for key in tensors) == original
    safetensors.numpy.save_file(tensors, file)
    assert_same(lora.load_lora(file, pipeline.unet_params)[0], mixed)


def test_kohyas_names_of_sdxl(tmp_path):
    """Those of the original code, by which kohya's scripts know them, and diffusers too."""
    config = json.loads((PUBLISHED / "sdxl" / "unet" / "config.json").read_text())
    shapes = shapes_of(config, told=(jnp.zeros((1, 1280)), jnp.zeros((1, 6))))
    targets = common.get_config("hate").lora.targets
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    adapters = lora.init_adapters(jax.random.key(0), zeros, rank=1, targets=targets)
    base = lora.kohya_base(shapes)
    assert base.name == "sdxl_base_v1-0"
    file = lora.save_kohya(tmp_path / "kohya.safetensors", adapters, {}, base)
    names = {key.partition(".")[0] for key in safetensors.numpy.load_file(file)}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0" in names
    assert "lora_unet_output_blocks_0_1_transformer_blocks_9_attn1_to_q" in names
    assert len(names) == 560
    found = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        str(file), unet_config=types.SimpleNamespace(**config)
    )[0]
    wanted = safetensors.numpy.load_file(lora.save_lora(tmp_path / "ours.safetensors", adapters))
    read = KeyReader(kernels(shapes))
    assert {read(key) for key in found} == {read(key) for key in wanted}
    assert_same(lora.load_lora(file, shapes)[0], adapters)


def test_a_projection_may_be_linear_in_one_and_a_convolution_in_the_other(
    mixed, pipeline, tmp_path
):
    file = lora.save_lora(tmp_path / "mixed.safetensors", mixed)
    tensors = safetensors.numpy.load_file(file)
    for key, tensor in tensors.items():
        if "proj_in" in key:
            tensors[key] = tensor.reshape(tensor.shape[:2])
        elif "to_q" in key:
            tensors[key] = tensor[:, :, None, None]
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    assert_same(lora.load_lora(file, pipeline.unet_params)[0], mixed)


def test_attention_processors(adapters, pipeline, tmp_path):
    file = lora.save_lora(tmp_path / "old.safetensors", adapters)
    tensors = {}
    for key, tensor in safetensors.numpy.load_file(file).items():
        attention, name, side = (
            key.removeprefix("unet.").replace("to_out.0", "to_out").rsplit(".", 3)[:3]
        )
        side = {"lora_A": "down", "lora_B": "up"}[side]
        tensors[f"{attention}.processor.{name}_lora.{side}.weight"] = tensor
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    assert_same(lora.load_lora(file, pipeline.unet_params)[0], adapters)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_original_names_are_those_that_diffusers_converts(base):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = json.loads((PUBLISHED / base / "unet" / "config.json").read_text())
    with torch.device("meta"):
        state = diffusers.UNet2DConditionModel.from_config(config).state_dict()
    layers = {key.rsplit(".", 1)[0] for key in state}
    names = original_unet_names(layers)
    assert len(set(names.values())) == len(layers)
    original = {}
    for key, tensor in state.items():
        layer, leaf = key.rsplit(".", 1)
        original[f"model.diffusion_model.{names[layer]}.{leaf}"] = tensor
    converted = convert_ldm_unet_checkpoint(original, config)
    assert converted.keys() == state.keys()
    assert all(converted[key] is state[key] for key in state)


def shapes_of(config, told=()):
    """Of a UNet's parameters; `told` is what it is told beside the prompt's states."""
    unet = UNet2DConditionModel(UNetConfig.from_dict(config))
    states = jnp.zeros((1, 2, config["cross_attention_dim"]))
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), states, *told
    return jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]


@pytest.mark.parametrize("name", ["sd15-diffusers", "sd15-attn-processor"])
def test_published_files(name):
    """LoRAs that strangers trained; not ours to ship."""
    folder = os.environ.get("SAFETYDPO_TEST_LORAS")
    if not folder:
        pytest.skip("SAFETYDPO_TEST_LORAS is not set to a folder with published LoRAs")
    config = json.loads((PUBLISHED / "sd15" / "unet" / "config.json").read_text())
    shapes = shapes_of(config)
    found, _ = lora.load_lora(Path(folder) / f"{name}.safetensors", shapes)
    flat = traverse_util.flatten_dict(found)
    assert len(flat) == 2 * 128
    assert all(np.any(leaf) for leaf in flat.values())
