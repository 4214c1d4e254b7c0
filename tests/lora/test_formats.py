import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import traverse_util

from safetydpo_jax import lora
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.lora.writer import KohyaBase

ALPHA, RANK = 6.0, 4


@pytest.fixture
def file(adapters, tmp_path):
    return lora.save_lora(
        tmp_path / "export" / "pytorch_lora_weights.safetensors",
        lora.scaled(adapters, ALPHA, RANK),
        {"category": "hate"},
    )


def changed(file, change):
    """The file after `change(tensors, header)`."""
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    tensors = safetensors.numpy.load_file(file)
    change(tensors, header)
    safetensors.numpy.save_file(tensors, file, metadata=header)


def assert_equal(ours, theirs):
    ours, theirs = traverse_util.flatten_dict(ours), traverse_util.flatten_dict(theirs)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-6)


def test_comes_back_ready_to_apply(file, adapters, pipeline):
    found, header = lora.load_lora(file, pipeline.unet_params)
    assert_equal(found, lora.scaled(adapters, ALPHA, RANK))
    assert header["category"] == "hate"
    assert header["format"] == "pt"


@pytest.mark.parametrize("kohya", [False, True])
def test_pytorch_diffusers_draws_the_same(kohya, file, adapters, pipeline, model_folder):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    t, embeds = np.array([10, 700]), rng.normal(size=(2, 12, 16)).astype(np.float32)
    torch_pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model_folder)

    def theirs():
        with torch.no_grad():
            answer = torch_pipeline.unet(
                torch.tensor(latents).permute(0, 3, 1, 2),
                torch.tensor(t),
                encoder_hidden_states=torch.tensor(embeds),
            ).sample
        return answer.permute(0, 2, 3, 1).numpy()

    apply = jax.jit(pipeline.unet.apply)
    found, _ = lora.load_lora(file, pipeline.unet_params)
    base = apply({"params": pipeline.unet_params}, latents, t, embeds)
    ours = apply({"params": pipeline.unet_params, "lora": found}, latents, t, embeds)
    np.testing.assert_allclose(theirs(), base, atol=1e-4)
    torch_pipeline.load_lora_weights(
        lora.save_kohya(file.parent / "comfyui" / "hate.safetensors", found) if kohya else file
    )
    np.testing.assert_allclose(theirs(), ours, atol=1e-4)
    assert np.abs(ours - base).max() > 0.05


def test_kohya_keys(file, pipeline):
    adapters, header = lora.load_lora(file, pipeline.unet_params)
    base = KohyaBase("sd_v2", {})
    path = lora.save_kohya(file.with_name("kohya.safetensors"), adapters, header, base)
    with safetensors.safe_open(path, "numpy") as opened:
        header = opened.metadata()
    assert header["ss_base_model_version"] == "sd_v2"
    assert (header["ss_v2"], header["ss_network_dim"]) == ("True", str(RANK))
    assert header["category"] == "hate"
    assert "lora_adapter_metadata" not in header
    tensors = safetensors.numpy.load_file(path)
    assert len(tensors) == 3 * len(safetensors.numpy.load_file(file)) // 2
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{name}.alpha"] == RANK  # the scale is in lora_up
    assert tensors[f"{name}.lora_down.weight"].shape[0] == RANK
    assert tensors[f"{name}.lora_up.weight"].shape[1] == RANK


def test_the_bytes_depend_on_the_content_alone(file, adapters):
    metadata = {name: name for name in "dcba"}
    one = lora.save_lora(file.with_name("1.safetensors"), adapters, metadata)
    two = lora.save_lora(
        file.with_name("2.safetensors"), adapters, dict(reversed(metadata.items()))
    )
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "1.safetensors",
        "2.safetensors",
        file.name,
    ]


def test_reads_the_alpha_that_diffusers_wrote(file, adapters, pipeline):
    """As from peft with lora_alpha 12 at rank 4."""

    def write_alpha(tensors, header):
        config = json.loads(header["lora_adapter_metadata"])
        header["lora_adapter_metadata"] = json.dumps(config | {"unet.lora_alpha": 12})

    changed(file, write_alpha)
    found, _ = lora.load_lora(file, pipeline.unet_params)
    assert_equal(found, lora.scaled(adapters, ALPHA * 12 / RANK, RANK))


def test_reads_the_official_spelling_in_half_precision(file, adapters, pipeline):
    def respell(tensors, header):
        header.pop("lora_adapter_metadata")
        for key in list(tensors):
            name = key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
            tensors[name] = tensors.pop(key).astype(np.float16)

    changed(file, respell)
    found, _ = lora.load_lora(file, pipeline.unet_params)
    expected = lora.scaled(adapters, ALPHA, RANK)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_what_is_for_text_encoders_is_left_out_and_said(file, adapters, pipeline):
    def add(tensors, header):
        tensors["text_encoder.layers.0.q_proj.lora_A.weight"] = np.zeros((4, 8), np.float32)
        tensors["lora_te_text_model_layers_0.lora_down.weight"] = np.zeros((4, 8), np.float32)

    changed(file, add)
    with pytest.warns(UserWarning, match=r"2 of \d+ tensors are for text encoders"):
        found, _ = lora.load_lora(file, pipeline.unet_params)
    assert_equal(found, lora.scaled(adapters, ALPHA, RANK))


def test_reads_the_header_of_peft_with_patterns(file, adapters, pipeline):
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}, "unet.use_rslora": True}

    def write(tensors, header):
        header["lora_adapter_metadata"] = json.dumps(config)

    changed(file, write)
    found, _ = lora.load_lora(file, pipeline.unet_params)
    flat, wanted = traverse_util.flatten_dict(found), traverse_util.flatten_dict(adapters)
    for path, leaf in flat.items():
        alpha = (2 if "to_q" in path else 8) * RANK**0.5
        factor = ALPHA / RANK * alpha / RANK if path[-1] == "b" else 1.0
        np.testing.assert_allclose(leaf, factor * wanted[path], rtol=1e-5)


def test_reads_bfloat16(file, adapters, pipeline):
    def halve(tensors, header):
        for key, tensor in tensors.items():
            tensors[key] = tensor.astype(jnp.bfloat16)

    changed(file, halve)
    found, _ = lora.load_lora(file, pipeline.unet_params)
    expected = lora.scaled(adapters, ALPHA, RANK)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2.0**-7)


def test_an_8_bit_file_is_refused(file, pipeline):
    tensors = safetensors.torch.load_file(file)
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    safetensors.torch.save_file(small, file)
    with pytest.raises(UserError, match="of a type that is not read here .*float16"):
        lora.load_lora(file, pipeline.unet_params)


def first(tensors, side):
    return next(key for key in sorted(tensors) if side in key)


def drop_b(tensors, header):
    del tensors[first(tensors, "lora_B")]


def wrong_shape(tensors, header):
    tensors[first(tensors, "lora_A")] = np.zeros((4, 7), np.float32)


def other_rank(tensors, header):
    key = first(tensors, "lora_B")
    tensors[key] = tensors[key][:, :3]


def unknown_layer(tensors, header):
    tensors["unet.up_blocks.9.to_q.lora_A.weight"] = np.zeros((4, 8), np.float32)


def unknown_kohya_layer(tensors, header):
    tensors["lora_unet_down_blocks_0_to_q.lora_down.weight"] = np.zeros((4, 8), np.float32)


def only_text_encoder(tensors, header):
    tensors.clear()
    tensors["lora_te1_layers_0_q_proj.lora_down.weight"] = np.zeros((4, 8), np.float32)


def twice(tensors, header):
    key = first(tensors, "lora_A")
    tensors[key.replace("unet.", "").replace("lora_A", "lora.down")] = tensors[key]


def rank_zero(tensors, header):
    for side, shape in (("lora_A", (0, 8)), ("lora_B", (8, 0))):
        tensors[first(tensors, side)] = np.zeros(shape, np.float32)


def bad_alpha(tensors, header):
    header["lora_adapter_metadata"] = json.dumps({"unet.lora_alpha": "x"})


def bad_pattern(tensors, header):
    header["lora_adapter_metadata"] = json.dumps({"unet.alpha_pattern": {"*": 8}})


def pissa(tensors, header):
    header["lora_adapter_metadata"] = json.dumps({"unet.init_lora_weights": "pissa_niter_4"})


def several_alphas(tensors, header):
    key = first(tensors, "lora_A").replace("lora_A.weight", "alpha")
    tensors[key] = np.ones(2, np.float32)


def a_number(tensors, header):
    tensors[first(tensors, "lora_B")] = np.ones((), np.float32)


def loha(tensors, header):
    tensors["lora_unet_mid_block.hada_w1_a"] = np.zeros((4, 8), np.float32)


def tucker(tensors, header):
    tensors["lora_unet_mid_block.lora_mid.weight"] = np.zeros((4, 4, 3, 3), np.float32)


def neither(tensors, header):
    tensors["unet.mid_block.weight"] = np.zeros((4, 8), np.float32)


def peft_without_config(tensors, header):
    for key in list(tensors):
        tensors[key.replace("unet.", "base_model.model.")] = tensors.pop(key)


def not_a_number(tensors, header):
    tensors[first(tensors, "lora_A")][0, 0] = np.nan


def empty(tensors, header):
    tensors.clear()


def dora(tensors, header):
    header["lora_adapter_metadata"] = json.dumps({"unet.use_dora": True})


def not_json(tensors, header):
    header["lora_adapter_metadata"] = "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_b, "has no lora_B"),
        (wrong_shape, r"has factors of shape \(4, 7\) and .*another base model"),
        (other_rank, "different rank, 4 and 3"),
        (unknown_layer, "up_blocks.9.to_q.* names no layer of this UNet"),
        (unknown_kohya_layer, "lora_unet_.* names no layer of this UNet"),
        (only_text_encoder, "all of its keys are for text encoders"),
        (twice, "is the second a of .* two LoRAs in one"),
        (rank_zero, "factors of rank 0"),
        (several_alphas, r"alpha has the shape \(2,\): export the file again"),
        (a_number, r"lora_B.weight has the shape \(\): export the file again"),
        (bad_alpha, "is no LoRA's config .*'x'"),
        (bad_pattern, "is no LoRA's config"),
        (pissa, "init_lora_weights 'pissa_niter_4' the adapter goes with a changed base"),
        (loha, "is of LoHa, which is not supported"),
        (tucker, "is of LoCon in Tucker form"),
        (neither, "unet.mid_block.weight' is in no LoRA format"),
        (peft_without_config, "adapter_config.json: missing, and peft says there"),
        (not_a_number, "NaN or infinity"),
        (empty, "holds no tensors"),
        (dora, "use_dora, which is not supported"),
        (not_json, "lora_adapter_metadata .* is no LoRA's config"),
    ],
)
def test_bad_files(change, message, file, pipeline):
    changed(file, change)
    with pytest.raises(UserError, match=message) as error:
        lora.load_lora(file, pipeline.unet_params)
    assert str(file.parent) in str(error.value)


def test_a_missing_file(tmp_path, pipeline):
    with pytest.raises(MissingFileError, match="no such file; give the path"):
        lora.load_lora(tmp_path / "nothing.safetensors", pipeline.unet_params)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(length, file, pipeline):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        lora.load_lora(file, pipeline.unet_params)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickle_is_refused(suffix, tmp_path, pipeline):
    file = tmp_path / f"lora{suffix}"
    file.write_bytes(b"\x80\x02anything")
    with pytest.raises(UserError, match=r"pickle files can run code .* convert it .*weights_only"):
        lora.load_lora(file, pipeline.unet_params)
