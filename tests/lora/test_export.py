"""launch/export.py: one LoRA in every format, the same numbers in each."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from safetensors.torch import save_file

from launch import export as command
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.lora import init_adapters, load_lora, save_lora
from safetydpo_jax.lora.base import unet_shapes
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.models.single_file import published
from tests.models.test_single_file import in_original_layout


@pytest.fixture
def file(pipeline, tmp_path):
    adapters = init_adapters(jax.random.key(0), pipeline.unet_params, rank=2, targets=("to_q",))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    return save_lora(tmp_path / "lora.safetensors", adapters, {"category": "hate"})


def run(*arguments):
    command.main([str(x) for x in arguments])


def leaves(path, pipeline):
    adapters, header = load_lora(path, pipeline.unet_params)
    return traverse_util.flatten_dict(adapters), header


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_there_and_back_to_the_bit(form, file, pipeline, model_folder, tmp_path, capsys):
    out = tmp_path / ("out" if form == "peft" else "out/x.safetensors")
    run("--lora", file, "--format", form, "--model", model_folder, "--out", out)
    written = out / "adapter_model.safetensors" if form == "peft" else out
    assert f"{written}: {form}, rank 2 on" in capsys.readouterr().out
    back = tmp_path / "back.safetensors"
    run("--lora", written, "--format", "diffusers", "--model", model_folder, "--out", back)
    (ours, header), (theirs, _) = leaves(back, pipeline), leaves(file, pipeline)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf)
    assert header["category"] == "hate"


def test_the_known_base_that_fits_and_the_scale(tmp_path):
    emoji = load_pipeline("emoji")
    adapters = init_adapters(jax.random.key(0), emoji.unet_params, rank=2, targets=("to_q",))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    file, out = save_lora(tmp_path / "a.safetensors", adapters), tmp_path / "b.safetensors"
    run("--lora", file, "--format", "kohya", "--scale", 0.5, "--out", out)
    (ours, header), (theirs, _) = leaves(out, emoji), leaves(file, emoji)
    assert header["export_scale"] == "0.5"
    assert "ss_base_model_version" not in header  # kohya has no name for it
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf * (0.5 if path[-1] == "b" else 1))


@pytest.mark.parametrize(
    ("base", "name", "is_v2"), [("sd15", "sd_v1", "False"), ("sd21-base", "sd_v2", "True")]
)
def test_a1111_is_told_the_base(base, name, is_v2, tmp_path):
    shapes = unet_shapes(published(base))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    adapters = init_adapters(jax.random.key(0), zeros, rank=1, targets=("attn2.to_k",))
    said = {"ss_network_alpha": "64", "sshs_model_hash": "0123", "modelspec.title": "mine"}
    file = save_lora(tmp_path / "a.safetensors", adapters, said)
    run("--lora", file, "--format", "kohya", "--out", tmp_path / "b.safetensors")
    with safetensors.safe_open(tmp_path / "b.safetensors", "numpy") as opened:
        header = opened.metadata()
    assert (header["ss_base_model_version"], header["ss_v2"]) == (name, is_v2)
    assert header["ss_network_alpha"] == "1"
    assert "sshs_model_hash" not in header  # the file is another
    assert header["modelspec.title"] == "mine"
    run("--lora", tmp_path / "b.safetensors", "--format", "peft", "--out", tmp_path / "peft")
    with safetensors.safe_open(tmp_path / "peft/adapter_model.safetensors", "numpy") as opened:
        assert "ss_network_alpha" not in opened.metadata()


def test_a_lora_that_fits_two_bases_names_none_unless_told(tmp_path, capsys):
    """Stable Diffusion 1 and 2 differ in what the text's keys and values are made of alone."""
    shapes = unet_shapes(published("sd21-base"))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    adapters = init_adapters(jax.random.key(0), zeros, rank=1, targets=("attn1.to_q",))
    file, out = save_lora(tmp_path / "a.safetensors", adapters), tmp_path / "b.safetensors"
    run("--lora", file, "--format", "kohya", "--out", out)
    assert "of sd15 or sd21-base; to name its base in the file, give --model" in (
        capsys.readouterr().out
    )
    with safetensors.safe_open(out, "numpy") as opened:
        assert "ss_base_model_version" not in opened.metadata()


def test_fused(file, model_folder, tmp_path, capsys):
    run("--lora", file, "--format", "fused", "--model", model_folder, "--out", tmp_path / "unet")
    assert "layers changed" in capsys.readouterr().out
    assert (tmp_path / "unet" / "config.json").is_file()


def test_fused_in_one_file(file, model_folder, pipeline, tmp_path, capsys):
    save_file(in_original_layout(model_folder, pipeline.params, "sd15"), tmp_path / "a.safetensors")
    given = ("--lora", file, "--format", "fused", "--model", tmp_path / "a.safetensors")
    given += ("--model_config", model_folder, "--out", tmp_path / "b.safetensors")
    run(*given)
    assert "layers changed, each in the type it had" in capsys.readouterr().out
    with pytest.raises(UserError, match="--dtype is of a folder: in one file each weight keeps"):
        run(*given, "--dtype", "float16")


def test_bad_inputs(file, model_folder, tmp_path, capsys):
    given = ("--lora", file, "--model", model_folder)
    with pytest.raises(UserError, match="its name must end in .safetensors"):
        run(*given, "--format", "kohya", "--out", tmp_path / "x.bin")
    with pytest.raises(UserError, match="x is said of a model, but there is none"):
        run("--lora", file, "--format", "peft", "--model_config", "x", "--out", tmp_path / "x")
    with pytest.raises(MissingFileError, match=r"gone.safetensors: no such file"):
        run("--lora", tmp_path / "gone.safetensors", "--format", "fused", "--model", "not/there",
            "--out", tmp_path / "x")  # fmt: skip
    with pytest.raises(SystemExit):
        run(*given, "--format", "kohya", "--dtype", "float16", "--out", tmp_path / "x.safetensors")
    assert "--dtype is of fused weights: kohya has float32" in capsys.readouterr().err
    with pytest.raises(UserError, match="It was held against emoji, sd15, .* give it as --model"):
        run("--lora", file, "--format", "kohya", "--out", tmp_path / "x.safetensors")
    sd15 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lora_down.weight": (4, 320), "lora_up.weight": (320, 4), "dora_scale": (1, 320)}
    for keys, message in (
        ({f"{sd15}.{name}": shape for name, shape in factors.items()}, "is of DoRA, which is not"),
        ({f"{sd15}.lora_down.weight": (4, 320)}, "attn1.to_q has no lora_B"),
        ({f"{sd15.replace('unet', 'te')}.lora_down.weight": (4, 320)}, "are for text encoders"),
    ):
        tensors = {key: np.zeros(shape, np.float32) for key, shape in keys.items()}
        safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=message) as raised:
            run("--lora", tmp_path / "other.safetensors", "--format", "peft", "--out", tmp_path)
        assert "held against" not in str(raised.value)
    with pytest.raises(MissingFileError, match=r"gone.safetensors: no such file"):
        run("--lora", tmp_path / "gone.safetensors", "--format", "peft", "--out", tmp_path / "x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not write"):
        run(*given, "--format", "peft", "--out", tmp_path / "file" / "x")
    with pytest.raises(SystemExit):
        run("--lora", file, "--format", "fused", "--out", tmp_path / "unet")
    assert "--format fused adds the LoRA into a model's weights: give --model" in (
        capsys.readouterr().err
    )
