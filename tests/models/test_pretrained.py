"""Checkpoints in the diffusers layout, between PyTorch and JAX, in both directions."""

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safetydpo_jax import sharding
from safetydpo_jax.diffusion import draw_pictures
from safetydpo_jax.errors import UserError
from safetydpo_jax.models import state_dict
from safetydpo_jax.models.pretrained import load_pipeline, save_pipeline

COMPONENTS = ("unet", "vae", "text_encoder")
TORCH_TYPES = {jnp.float32: torch.float32, jnp.float16: torch.float16, jnp.bfloat16: torch.bfloat16}


def assert_same_weights(ours: diffusers.StableDiffusionPipeline, theirs, dtype=torch.float32):
    for name in COMPONENTS:
        got, wanted = (getattr(p, name).state_dict() for p in (ours, theirs))
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(got[key], wanted[key].to(dtype)), f"{name}: {key}"


def assert_same_params(got, wanted):
    for name in ("unet_params", "vae_params", "text_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(wanted, name))


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=lambda dtype: dtype.__name__)
def test_pytorch_reads_back_what_it_wrote(saved_pipeline, torch_pipeline, tmp_path, dtype):
    save_pipeline(load_pipeline(saved_pipeline), tmp_path, dtype)
    ours = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, dtype=TORCH_TYPES[dtype])
    assert_same_weights(ours, torch_pipeline, TORCH_TYPES[dtype])
    prompt = "A photo of a bell."
    assert ours.tokenizer(prompt).input_ids == torch_pipeline.tokenizer(prompt).input_ids
    assert {"vocab.json", "merges.txt"} <= {x.name for x in (tmp_path / "tokenizer").iterdir()}
    assert ours.scheduler.config.beta_end == torch_pipeline.scheduler.config.beta_end


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(saved_pipeline, checkpoint, dtype):
    """A published fp16 variant beside no full-precision file, or a file that is half throughout."""
    wanted = load_pipeline(saved_pipeline)
    for name in COMPONENTS:
        (file,) = (checkpoint / name).glob("*.safetensors")
        variant = ".fp16.safetensors" if dtype == torch.float16 else ".safetensors"
        tensors = {key: x.to(dtype) for key, x in load_file(file).items()}
        file.unlink()
        save_file(tensors, file.with_suffix(variant))
    got = load_pipeline(checkpoint)
    rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    for name in ("unet_params", "vae_params", "text_params"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=rounding, atol=1e-6),
            getattr(got, name),
            getattr(wanted, name),
        )


def test_sharded_files(saved_pipeline, checkpoint, torch_pipeline):
    for name in COMPONENTS:
        (file,) = (checkpoint / name).glob("*.safetensors")
        file.unlink()
        getattr(torch_pipeline, name).save_pretrained(checkpoint / name, max_shard_size="40KB")
        assert len(list((checkpoint / name).glob("*.safetensors"))) > 1
    assert_same_params(load_pipeline(checkpoint), load_pipeline(saved_pipeline))


def test_names_of_older_files(saved_pipeline, checkpoint):
    """As in the published Stable Diffusion 1.5 and 2.1."""
    vae = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, x in load_file(vae).items():
        for new_name, old_name in old.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        tensors[key] = x
    assert tensors.keys() != load_file(vae).keys()
    save_file(tensors, vae)
    text = checkpoint / "text_encoder/model.safetensors"
    tensors = {f"text_model.{key}": x for key, x in load_file(text).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    # As in files of all of CLIP, and where a config leaves out last layers ("clip skip").
    tensors |= {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(3, 3)}
    tensors["text_model.encoder.layers.9.mlp.fc1.bias"] = torch.ones(3)
    save_file(tensors, text)
    config = checkpoint / "unet/config.json"
    lists = {"layers_per_block": [1, 1], "sample_size": [8, 8]}
    before = json.loads(config.read_text())
    same = {key: x for key, x in lists.items() if before[key] == x[0]}
    assert same
    config.write_text(json.dumps(before | same))
    assert_same_params(load_pipeline(checkpoint), load_pipeline(saved_pipeline))


def test_the_pipeline_encodes_and_decodes_as_pytorchs(saved_pipeline, torch_pipeline):
    ours = load_pipeline(saved_pipeline)
    assert (ours.latent_shape, ours.resolution) == ((8, 8, 4), 16)

    prompts = ["a bell", "", "a very long prompt " * 9]
    with torch.no_grad():
        embeds = torch_pipeline.encode_prompt(prompts, "cpu", 1, False)[0].numpy()
    got = ours.encode_prompts(prompts, batch_size=2).prompt_embeds
    assert got.shape == (3, 77, 48)
    np.testing.assert_allclose(got, embeds, rtol=0, atol=2e-4 * np.abs(embeds).max())

    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    pixels = torch_pipeline.image_processor.preprocess(pictures / np.float32(255))
    scale = torch_pipeline.vae.config.scaling_factor
    with torch.no_grad():
        moments = torch_pipeline.vae.encode(pixels).latent_dist
        decoded = torch_pipeline.vae.decode(moments.mean).sample
    mean, logvar = ours.encode_images(pictures, batch_size=2)
    wanted = (scale * moments.mean).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(mean, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
    wanted = (scale**2 * moments.var).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.exp(logvar), wanted, rtol=2e-3)

    wanted = torch_pipeline.image_processor.postprocess(decoded, output_type="np") * 255
    got = ours.decode_latents(mean, batch_size=2)
    assert got.dtype == np.uint8
    assert np.abs(got - wanted).max() <= 0.51


def test_half_precision_parameters_are_held_as_asked_for(saved_pipeline):
    pipeline = load_pipeline(saved_pipeline, jnp.bfloat16)
    types = {x.dtype for x in jax.tree.leaves((pipeline.unet_params, pipeline.text_params))}
    assert types == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(pipeline.vae_params)} == {jnp.dtype(jnp.float32)}


def test_the_unet_goes_straight_to_its_shards(saved_pipeline, monkeypatch):
    mesh = sharding.make_mesh(fsdp=4)
    rules = [(r"attn\d\.to_[qkv]\.kernel", (None, "fsdp"))]
    monkeypatch.setattr(state_dict, "_SECONDS_BETWEEN_LINES", -1)
    lines = []
    pipeline = load_pipeline(
        saved_pipeline,
        unet_shardings=lambda shapes: sharding.param_shardings(mesh, shapes, rules),
        progress=lines.append,
    )
    wanted = load_pipeline(saved_pipeline)
    assert_same_params(pipeline, wanted)
    params = pipeline.unet_params
    kernel = params["down_blocks.0"]["attentions.0"]["transformer_blocks.0"]["attn1"]["to_q"]
    assert kernel["kernel"].addressable_shards[0].data.shape[1] * 4 == kernel["kernel"].shape[1]
    assert params["conv_in"]["kernel"].sharding.is_fully_replicated
    percents = [int(re.fullmatch(r"unet: (\d+)% read", x)[1]) for x in lines if "une" in x]
    assert percents == sorted(percents)
    assert 90 < percents[-1] <= 100
    options = {"sampler": "euler", "num_steps": 2, "guidance_scale": 3.0}
    ours, theirs = (draw_pictures(p, ["a bell"], [0], **options) for p in (pipeline, wanted))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("kernel", (None, "fsbp")), "'kernel' does not fit .*fsbp"),
        (("conv_in.kernel", ("fsdp",)), "'conv_in.kernel' does not fit conv_in.kernel"),
        (("(", ()), r"'\(' is no regular expression"),
    ],
)
def test_rules_that_do_not_fit(rule, message):
    mesh = sharding.make_mesh(fsdp=4)
    params = {"conv_in": {"kernel": jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32)}}
    with pytest.raises(UserError, match=f"mesh.rules: {message}"):
        sharding.param_shardings(mesh, params, [rule])


@pytest.mark.parametrize("limit", [1000, None])
def test_prompts_are_cut_to_what_the_text_encoder_can_read(checkpoint, limit):
    """Some published tokenizers name no length or a wrong one."""
    file = checkpoint / "tokenizer/tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("model_max_length")
    file.write_text(json.dumps(settings | ({"model_max_length": limit} if limit else {})))
    pipeline, long = load_pipeline(checkpoint), "a bell " * 90
    assert pipeline.encode_prompts([long]).prompt_embeds.shape == (1, 77, 48)
    assert pipeline.num_cut([long, "a bell", long + "rings"]) == 2


def test_weights_too_large_for_the_type_are_not_written(saved_pipeline, tmp_path):
    pipeline = load_pipeline(saved_pipeline)
    pipeline.vae_params["quant_conv"]["bias"] = jnp.full((8,), 1e5)
    with pytest.raises(UserError, match=r"not written: 'quant_conv\.bias' .* as float16"):
        save_pipeline(pipeline, tmp_path, jnp.float16)
    assert not list(tmp_path.glob("vae/*.safetensors"))
