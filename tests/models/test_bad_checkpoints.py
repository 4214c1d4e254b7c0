"""What a wrong or damaged checkpoint is told: what is wrong, and where."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models import checkpoint as checkpoint_module
from safetydpo_jax.models.pretrained import load_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


def remove(path: str):
    return lambda folder: (folder / path).unlink()


def write(path: str, content: str):
    return lambda folder: (folder / path).write_text(content)


def settings(path: str, **changes):
    """Changes keys of a JSON file; None removes one."""

    def spoil(folder: Path):
        content = json.loads((folder / path).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / path).write_text(json.dumps(content))

    return spoil


def tensors(change):
    """Rewrites the UNet's weights by `change`, which edits the dict of tensors in place."""

    def spoil(folder: Path):
        content = load_file(folder / UNET)
        change(content)
        save_file(content, folder / UNET)

    return spoil


def truncate(folder: Path):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[: len(content) // 2])


def pickled(folder: Path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was read",))

    (folder / UNET).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def index(weight_map):
    def spoil(folder: Path):
        (folder / UNET).unlink()
        (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def poison(value: float):
    return lambda weights: weights["conv_in.weight"].__setitem__((0, 0, 0, 0), value)


def reshape(weights: dict):
    weights["conv_in.weight"] = np.zeros((16, 4, 1, 1), np.float32)


def add_a_word(folder: Path):
    file = folder / "tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["bell</w>"] = 514
    file.write_text(json.dumps(content))


def no_middle_block(folder: Path):
    file = folder / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mid_block_type": None}))


UNET_CONFIG, VAE_CONFIG = "unet/config.json", "vae/config.json"
TEXT_CONFIG, SCHEDULER = "text_encoder/config.json", "scheduler/scheduler_config.json"

CASES = {
    # files
    "no model index": (remove("model_index.json"), "no model_index.json in it"),
    "no config": (remove(VAE_CONFIG), "vae/config.json: missing"),
    "no scheduler": (remove(SCHEDULER), "scheduler_config.json: missing"),
    "no weights": (remove(UNET), "unet: no .safetensors weights"),
    "no vocabulary": (remove("tokenizer/tokenizer.json"), "tokenizer/vocab.json: missing"),
    "config is not JSON": (write(UNET_CONFIG, "{'a': 1}"), "unet/config.json: not JSON"),
    "config is a list": (write(UNET_CONFIG, "[]"), "unet/config.json: not a JSON object"),
    "vocabulary is not JSON": (write("tokenizer/tokenizer.json", "{"), "not a CLIP tokenizer"),
    "vocabulary is something else": (write("tokenizer/tokenizer.json", "{}"), "not a CLIP token"),
    "truncated weights": (truncate, r"unet.*\.safetensors: not a whole .* it may be cut short"),
    "empty weights": (write(UNET, ""), r"unet.*\.safetensors: not a whole"),
    "pickled weights": (pickled, r"\.bin: pickled weights .* never read .* convert them"),
    "index escapes the folder": (index({"x": "../vae/a.safetensors"}), "outside its folder"),
    "index names an absolute path": (index({"x": "/etc/passwd"}), "outside its folder"),
    "index names no file": (index({"x": 3}), "not a safetensors index"),
    "index without a map": (index(None), "not a safetensors index"),
    "shard is missing": (index({"x": "a.safetensors"}), "a.safetensors: this shard .* missing"),
    # weights
    "missing tensor": (
        tensors(lambda w: w.pop("mid_block.resnets.0.conv1.weight")),
        r"unet: the checkpoint lacks mid_block\.resnets\.0\.conv1\.weight",
    ),
    "unknown tensor": (
        tensors(lambda w: w.update({"controlnet.weight": np.zeros(3, np.float32)})),
        r"unet: the checkpoint has unknown controlnet\.weight",
    ),
    "misshapen tensor": (
        tensors(reshape),
        r"'conv_in\.weight' has shape \(16, 4, 1, 1\), .* asks for \(16, 4, 3, 3\)",
    ),
    "tensor with NaN": (tensors(poison(np.nan)), r"'conv_in\.weight' holds NaN or infinity"),
    "tensor with infinity": (tensors(poison(np.inf)), r"'conv_in\.weight' holds NaN or infinity"),
    # configs
    "another pipeline": (
        settings("model_index.json", _class_name="FluxPipeline"),
        "model_index.json: a FluxPipeline is not supported",
    ),
    "another network": (
        settings(UNET_CONFIG, _class_name="SD3Transformer2DModel"),
        "unet/config.json: this is a SD3Transformer2DModel",
    ),
    "another text encoder": (settings(TEXT_CONFIG, architectures=["T5EncoderModel"]), "T5Encoder"),
    "another scheduler": (
        settings(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        "FlowMatchEulerDiscreteScheduler",
    ),
    "another prediction": (settings(SCHEDULER, prediction_type="sample"), "prediction_type"),
    "missing key": (settings(UNET_CONFIG, cross_attention_dim=None), "'cross_attention_dim' is mi"),
    "unknown block": (
        settings(UNET_CONFIG, down_block_types=["AttnDownBlock2D", "DownBlock2D"]),
        "'down_block_types' has 'AttnDownBlock2D'; supported: CrossAttnDownBlock2D",
    ),
    "too few blocks": (
        settings(UNET_CONFIG, up_block_types=["UpBlock2D"]),
        "'up_block_types' has 1 entries for 2 blocks",
    ),
    "unsupported key": (settings(UNET_CONFIG, class_embed_type="timestep"), "'class_embed_type'"),
    "unsupported value": (settings(TEXT_CONFIG, hidden_act="relu"), "'hidden_act' is 'relu'"),
    "gated attention": (settings(UNET_CONFIG, attention_type="gated"), "'attention_type'"),
    "shifted latents": (settings(VAE_CONFIG, shift_factor=0.1), "'shift_factor' = 0.1"),
    "no middle block": (no_middle_block, "'mid_block_type' is null"),
    "layers of their own for each block": (
        settings(UNET_CONFIG, layers_per_block=[1, 2]),
        r"'layers_per_block' is \[1, 2\]; one whole number is supported",
    ),
    "groups that do not divide": (settings(UNET_CONFIG, norm_num_groups=7), "'norm_num_groups'"),
    "heads that do not divide": (settings(TEXT_CONFIG, num_attention_heads=5), "attention_heads"),
    "folders of two checkpoints": (
        settings(TEXT_CONFIG, hidden_size=64),
        "cross_attention_dim is 48, but the text encoders' width is 64",
    ),
    "another checkpoint's latents": (settings(VAE_CONFIG, latent_channels=8), "in_channels is 4"),
    "another checkpoint's tokenizer": (
        add_a_word,
        "515 tokens, but the text encoder knows 514",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_named(case, checkpoint):
    spoil, message = CASES[case]
    spoil(checkpoint)
    started = time.process_time()
    with pytest.raises(UserError, match=message):
        load_pipeline(checkpoint)
    assert time.process_time() - started < 5


def test_a_wrong_path_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere: no such folder"):
        load_pipeline(tmp_path / "nowhere")


def test_an_installation_without_the_embedded_model_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(MissingFileError, match=r"launch/pretrain\.py"):
        checkpoint_module.resolve_checkpoint("emoji")
