"""The UNet with a LoRA in its weights is the UNet with the LoRA, in PyTorch too."""

import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safetydpo_jax.errors import UserError
from safetydpo_jax.lora import init_adapters, load_lora, save_lora, scaled
from safetydpo_jax.lora.fuse import fuse, fuse_file
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.tensor_file import opened
from tests.models.test_single_file import in_original_layout

TARGETS = ("to_q", "to_out.0", "conv1", r"ff\.net\.\d.*", "proj_in")


@pytest.fixture(scope="module")
def lora_file(pipeline, tmp_path_factory):
    """Of linear layers and convolutions; it changes all of them."""
    adapters = init_adapters(jax.random.key(0), pipeline.unet_params, rank=2, targets=TARGETS)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    return save_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", adapters)


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [
        ("float32", 1.0, 1e-5),
        ("float32", -0.5, 1e-5),
        ("float16", 1.0, 5e-3),
        ("bfloat16", 1, 0.05),
    ],
)
def test_fused_is_adapted(dtype, scale, tolerance, model_folder, pipeline, lora_file, tmp_path):
    out = tmp_path / "unet"
    fuse(str(model_folder), lora_file, out, scale=scale, dtype=dtype)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    times, text = np.array([3, 800]), rng.normal(size=(2, 12, 16)).astype(np.float32)
    adapters, _ = load_lora(lora_file, pipeline.unet_params)
    params = {"params": pipeline.unet_params}
    apply = jax.jit(pipeline.unet.apply)
    inputs = [jnp.asarray(x) for x in (latents, times, text)]
    wanted = np.asarray(apply(params | {"lora": scaled(adapters, scale, 1)}, *inputs))
    base = np.asarray(apply(params, *inputs))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(out, torch_dtype=torch.float32)
    with torch.no_grad():
        got = theirs(
            torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(times),
            torch.from_numpy(text),
        ).sample
    got = got.numpy().transpose(0, 2, 3, 1)
    size = np.abs(wanted).max()
    assert np.abs(got - wanted).max() <= tolerance * size
    assert np.abs(base - wanted).max() > 0.2 * size


def test_the_fused_checkpoint_is_one(model_folder, lora_file, tmp_path, capsys):
    whole = shutil.copytree(model_folder, tmp_path / "whole")
    shutil.rmtree(whole / "unet")
    fuse(str(model_folder), lora_file, whole / "unet", progress=print)
    assert (
        "diffusion_pytorch_model.safetensors: 0.00 GB, 36 layers changed" in capsys.readouterr().out
    )
    assert load_pipeline(whole).latent_shape == (8, 8, 4)
    assert {file.name for file in (whole / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


@pytest.fixture(scope="module")
def whole_file(model_folder, pipeline, tmp_path_factory):
    """The checkpoint in one file, as others write them: in half precision, with integers."""
    found = in_original_layout(model_folder, pipeline.params, "sd15")
    found = {
        key: x.half() if key.startswith("model.diffusion_model.") else x for key, x in found.items()
    }
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    found["model_ema.decay"] = torch.tensor(1.0)
    file = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    save_file(found, file, {"format": "pt", "modelspec.hash_sha256": "0x12", "licence": "mine"})
    return file


def test_a_checkpoint_in_one_file(whole_file, model_folder, lora_file, tmp_path, capsys):
    out, configs = tmp_path / "new" / "safe.safetensors", str(model_folder)
    fuse_file(str(whole_file), lora_file, out, configs=configs, scale=0.5, progress=print)
    told = capsys.readouterr().out
    assert "36 layers changed, each in the type it had" in told
    assert "model_ema.* are as they were" in told
    fuse(str(whole_file), lora_file, tmp_path / "unet", scale=0.5, configs=configs)
    wanted = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    got = diffusers.StableDiffusionPipeline.from_single_file(
        str(out), config=configs, local_files_only=True, torch_dtype=torch.float16
    )
    for key, x in got.unet.state_dict().items():
        assert torch.equal(x, wanted[key]), key
    changed = 0
    with opened(whole_file) as before, opened(out) as after:
        names = before.keys()
        assert names == after.keys()
        for key in names:
            x, y = before.read(key), after.read(key)
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            changed += not np.array_equal(x, y)
        about = after.metadata()
    assert changed == 36
    assert "modelspec.hash_sha256" not in about
    assert about["licence"] == "mine"
    assert about["fused_lora"] == "lora.safetensors"
    assert about["fused_scale"] == "0.5"


def test_what_makes_no_checkpoint_in_one_file(
    whole_file, model_folder, lora_file, tmp_path, monkeypatch
):
    out, configs = tmp_path / "safe.safetensors", str(model_folder)
    with pytest.raises(UserError, match="is not one file, as .*safe.safetensors would be: give a"):
        fuse_file(str(model_folder), lora_file, out, configs="")
    for read in (whole_file, lora_file):
        with pytest.raises(UserError, match="is read here, and would be lost: give another name"):
            fuse_file(str(whole_file), lora_file, read, configs=configs)
    with pytest.raises(UserError, match="NaN or infinity as float16; lower --scale, or write a fo"):
        fuse_file(str(whole_file), lora_file, out, configs=configs, scale=1e7)
    tensors = in_original_layout(model_folder, load_pipeline(model_folder).params, "sd15")
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    for changes, message in (
        ({key: tensors[key][1:].clone()}, r"attn1.to_q.weight' has \(7, 8\), where \(8, 8\)"),
        ({key: None}, "attn1.to_q.weight' is missing, where"),
        ({key: tensors[key].double()}, "to_q.weight' is of a type that is not changed here"),
        ({key: tensors[key].to(torch.float8_e4m3fn)}, "is of a type that is not changed here"),
        ({key: tensors[key] * torch.nan}, "to_q.weight' holds NaN or infinity; the checkpoint is"),
    ):
        save_file({k: x for k, x in (tensors | changes).items() if x is not None},
                  tmp_path / "other.safetensors")  # fmt: skip
        with pytest.raises(UserError, match=message):
            fuse_file(str(tmp_path / "other.safetensors"), lora_file, out, configs=configs)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not write .*safe.safetensors"):
        fuse_file(
            str(whole_file), lora_file, tmp_path / "file" / "safe.safetensors", configs=configs
        )
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "the type is 'int8': it must be one of float16"),
        ({"lora": "missing.safetensors"}, "no such file; give the path"),
        ({"model": "nowhere"}, "no such folder"),
        ({"scale": 1e7}, "as float16; a wider type may hold it"),
    ],
)
def test_bad_inputs(changes, message, model_folder, lora_file, tmp_path):
    options = {"model": str(model_folder), "lora": lora_file, "out": tmp_path / "unet"} | changes
    options["lora"] = Path(options["lora"])
    with pytest.raises(UserError, match=message):
        fuse(**options)
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert left <= {"config.json"}


def test_nothing_is_overwritten(model_folder, lora_file, tmp_path):
    fuse(str(model_folder), lora_file, tmp_path / "unet")
    with pytest.raises(UserError, match="holds weights, diffusion_pytorch_model.safetensors: give"):
        fuse(str(model_folder), lora_file, tmp_path / "unet")


def test_a_disk_that_is_full(model_folder, lora_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not write .*unet"):
        fuse(str(model_folder), lora_file, tmp_path / "file" / "unet")
