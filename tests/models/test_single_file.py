"""Checkpoints in one file of the original layout: read as diffusers reads them, or refused."""

import functools
import re

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from safetydpo_jax import storage
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models.checkpoint import CLASSES, build_networks, check_index, read_json
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.models.single_file import FAMILIES, config_folder, guess_family, tables
from tests.models import torch_models

# Where the text encoders of each family's files are.
TEXT_KEYS = {
    "sd15": {"cond_stage_model.transformer.text_model."},
    "sd21-768": {"cond_stage_model.model."},
    "sdxl": {"conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."},
}
CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def in_original_layout(folder, params, family):
    """All weights of a diffusers folder under their original names."""
    found = {}
    for name, table in tables(TEXT_KEYS[family], params).items():
        [file] = (folder / name).glob("*.safetensors")
        weights = load_file(file)
        weights = {f"text_model.{key}": x for key, x in weights.items()} | weights
        for key, parts in table.entries.items():
            names = [theirs for theirs, _ in parts]
            if len(names) > 1:  # open_clip has these three in one
                names = [name for x in "qkv" for name in names if f".{x}_proj." in name]
            tensor = torch.cat([weights[name] for name in names])
            if key.endswith("text_projection"):
                tensor = tensor.T
            if re.search(r"first_stage_model.*attn_1\.(q|k|v|proj_out)\.weight", key):
                tensor = tensor[:, :, None, None]
            found[key] = tensor.contiguous()
    # What such files hold beside that: buffers, and of Stable Diffusion 2 a layer nobody uses.
    found["alphas_cumprod"] = torch.ones(1000)
    if family == "sd21-768":
        found["cond_stage_model.model.transformer.resblocks.23.ln_1.bias"] = torch.ones(48)
        found["cond_stage_model.model.logit_scale"] = torch.tensor(1.0)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a family, a diffusers folder and its weights in one file."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp("checkpoint")
        made = torch_models.family_pipeline(family, tmp_path_factory.mktemp("tokenizers"))
        made.save_pretrained(folder)
        file = folder / "whole.safetensors"
        save_file(in_original_layout(folder, load_pipeline(folder).params, family), file)
        return folder, file

    return make


@pytest.mark.parametrize("family", TEXT_KEYS)
def test_reads_what_diffusers_reads(family, checkpoint):
    folder, file = checkpoint(family)
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else None
    kind = kind or diffusers.StableDiffusionPipeline
    theirs = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    from_folder = load_pipeline(folder)
    for name in from_folder.params:
        [weights] = (folder / name).glob("*.safetensors")
        wanted = {key.removeprefix("text_model."): x for key, x in load_file(weights).items()}
        for key, x in getattr(theirs, name).state_dict().items():
            key = key.removeprefix("text_model.")
            if key in wanted:  # else a buffer
                assert torch.equal(x, wanted.pop(key)), f"{name}: {key}"
        assert not wanted
    ours = load_pipeline(file, configs=str(folder))
    jax.tree.map(np.testing.assert_array_equal, ours.params, from_folder.params)
    assert ours.configs == from_folder.configs
    assert ours.sources["unet"] == [folder / "unet/config.json", file]
    assert storage.hash_parts(ours.sources) != storage.hash_parts(from_folder.sources)


def test_another_autoencoder(checkpoint, tmp_path):
    folder, file = checkpoint("sd15")
    torch_models.randomise(torch_models.torch_vae("sd15"), seed=1).save_pretrained(tmp_path / "vae")
    wanted = load_pipeline(folder, vae=str(tmp_path / "vae"))
    ours = load_pipeline(file, configs=str(folder), vae=str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours.params, wanted.params)
    assert ours.sources["vae"][0] == tmp_path / "vae" / "config.json"
    same = jax.tree.map(np.array_equal, ours.vae_params, load_pipeline(folder).vae_params)
    assert not jax.tree.all(same)
    for name, what in (("nowhere", "no such folder"), ("vae/config.json", "not a folder")):
        with pytest.raises(MissingFileError, match=f"{name}: {what}; give an autoencoder's"):
            load_pipeline(file, configs=str(folder), vae=str(tmp_path / name))
    with pytest.raises(UserError, match=r"model_config is sd15, but .* has its own configs"):
        load_pipeline(folder, configs="sd15")
    # The folder's own autoencoder, and not the file's, if it is asked for.
    ours = load_pipeline(file, configs=str(folder), vae=str(folder))
    assert ours.sources["vae"][1] == folder / "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("names", ["original", "checkpoint's", "diffusers'", "its older ones"])
@pytest.mark.parametrize("base", ["folder", "file"])
def test_an_autoencoder_in_one_file(names, base, checkpoint, tmp_path):
    folder, file = checkpoint("sd15")
    torch_models.randomise(torch_models.torch_vae("sd15"), seed=1).save_pretrained(tmp_path / "vae")
    wanted, vae = load_pipeline(folder, vae=str(tmp_path / "vae")), tmp_path / "vae.safetensors"
    [weights] = (tmp_path / "vae").glob("*.safetensors")
    if names == "diffusers'":
        vae.write_bytes(weights.read_bytes())
    elif names == "its older ones":
        older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
        older |= {".to_out.0.": ".proj_attn."}
        found = load_file(weights)
        for new, old in older.items():
            found = {key.replace(new, old): x for key, x in found.items()}
        save_file(found, vae)
    else:
        prefix = "" if names == "original" else "first_stage_model."
        table = tables(TEXT_KEYS["sd15"], {"vae": wanted.vae_params})["vae"].entries
        found = {
            key.replace("first_stage_model.", prefix): load_file(weights)[theirs]
            for key, [(theirs, _)] in table.items()
        }
        for key in found:
            if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):
                found[key] = found[key][:, :, None, None].clone()
        save_file(found | {"loss.logvar": torch.zeros(1)}, vae)
    configs = {} if base == "folder" else {"configs": str(folder)}
    ours = load_pipeline(folder if base == "folder" else file, vae=str(vae), **configs)
    jax.tree.map(np.testing.assert_array_equal, ours.params, wanted.params)
    assert ours.sources["vae"] == [folder / "vae" / "config.json", vae]


def test_a_file_without_an_autoencoder(checkpoint, tmp_path):
    folder, _ = checkpoint("sd15")
    save_file({"x": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(
        UserError, match=r"vae.safetensors: .* lacks decoder.*in the sizes of .*vae"
    ):
        load_pipeline(folder, vae=str(tmp_path / "vae.safetensors"))
    with pytest.raises(UserError, match=r"vae.pt: pickle files can run code and are not read"):
        load_pipeline(folder, vae=str(tmp_path / "vae.pt"))


def write(file, width=None, keys=(), **metadata):
    tensors = {key: torch.ones(1) for key in keys}
    if width:
        tensors[CROSS] = torch.ones(320, width)
    save_file(tensors, file, metadata=metadata or None)
    return file


@pytest.mark.parametrize(
    ("family", "contents"),
    [
        ("sd15", {"width": 768}),
        ("sd21-base", {"width": 1024, "modelspec.prediction_type": "epsilon"}),
        ("sd21-768", {"width": 1024, "modelspec.prediction_type": "v"}),
        ("sd21-768", {"width": 1024, "keys": ["v_pred"]}),
        ("sdxl", {"keys": ["conditioner.embedders.1.model.ln_final.bias"]}),
    ],
)
def test_families_are_told_apart(family, contents, tmp_path):
    file = write(tmp_path / "x.safetensors", **contents)
    assert guess_family(file) == family
    assert config_folder(file).name == family


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"width": 1024}, "predicts noise .* or velocity .*model_config, sd21-base or"),
        ({"keys": ["conditioner.embedders.1.x", "v_pred"]}, "like sdxl, but its UNet predicts"),
        ({"keys": ["conditioner.embedders.1.x", "edm_mean"]}, "like sdxl, but its UNet predicts"),
        ({"width": 768, "modelspec.prediction_type": "v"}, "like sd15, but its UNet predicts"),
        ({"keys": ["double_blocks.0.img_attn.norm"]}, "no Stable Diffusion 1.x, 2.x or XL"),
    ],
)
def test_families_that_cannot_be_told(contents, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_pipeline(write(tmp_path / "x.safetensors", **contents))


@pytest.mark.parametrize("family", FAMILIES)
def test_packaged_configs_are_whole(family):
    """Every config is one that we read, every tokenizer CLIP's."""
    folder = config_folder(torch_models.PUBLISHED, family)
    index = check_index(folder / "model_index.json")
    parts = [*CLASSES[index["_class_name"]], "scheduler"]
    files = [next((folder / part).glob("*config.json")) for part in parts]
    networks, _ = build_networks(dict(zip(parts, map(read_json, files), strict=True)))
    assert set(networks) == set(parts) - {"scheduler"}
    for tokenizer in folder.glob("tokenizer*"):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer)
        ids = tokenizer("a red apple", padding="max_length").input_ids
        assert ids[:6] == [49406, 320, 736, 3055, 49407, tokenizer.pad_token_id]
        assert len(ids) == 77


CASES = {
    "no such file": ("missing.safetensors", {}, "missing.safetensors: no such file"),
    "pickled": ("model.ckpt", None, "pickle files can run code"),
    "truncated": ("model.safetensors", None, "not a whole safetensors file"),
    "unknown configs": ("whole.safetensors", {"configs": "sd3"}, "one of sd15, sd21-base"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_files(case, tmp_path):
    name, options, message = CASES[case]
    if case == "unknown configs":
        write(tmp_path / name, width=768)
    elif case != "no such file":
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises((UserError, MissingFileError), match=message):
        load_pipeline(tmp_path / name, **options or {})


def test_what_an_autoencoder_was_trained_with_is_left_out(checkpoint, tmp_path):
    folder, file = checkpoint("sd15")
    of_training = {"loss.logvar": torch.full((), torch.nan), "model_ema.decay": torch.ones(())}
    tensors = load_file(file) | {f"first_stage_model.{k}": x for k, x in of_training.items()}
    save_file(tensors, tmp_path / "whole.safetensors")
    ours = load_pipeline(tmp_path / "whole.safetensors", configs=str(folder))
    jax.tree.map(np.testing.assert_array_equal, ours.params, load_pipeline(folder).params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("first_stage_model.decoder.mid.attn_1.q.bias"), "lacks first_stage_model"),
        (lambda x: x.pop("model.diffusion_model.out.2.weight"), "lacks model.diffusion_model.out"),
        (lambda x: x.update({"model.diffusion_model.extra": torch.ones(1)}), "unknown model.diff"),
        (
            lambda x: x.update({"model.diffusion_model.out.2.bias": torch.ones(9)}),
            r"out\.2\.bias' has shape \(9,\), but its config.json asks for \(4,\)",
        ),
        (
            lambda x: x.update({"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)}),
            r"out\.2\.bias' holds NaN",
        ),
    ],
)
def test_bad_tensors_are_named(change, message, checkpoint, tmp_path):
    folder, file = checkpoint("sd15")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match=message):
        load_pipeline(tmp_path / "whole.safetensors", configs=str(folder))
