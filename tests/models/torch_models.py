"""Small PyTorch models with the structure of published checkpoints and no weight left at rest."""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import safetydpo_jax

PUBLISHED = Path(safetydpo_jax.__file__).parent / "models" / "published"

# Widths only: blocks, layer counts, head counts and every other key stay as published. Heads are 5,
# 10 and 20 (8 in SD 1.5), so the widths are multiples of those.
_UNET = {
    "sd15": {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8},
    "sd21-base": {"block_out_channels": [40, 80, 80, 80], "norm_num_groups": 8},
    "sd21-768": {"block_out_channels": [40, 80, 80, 80], "norm_num_groups": 8},
    "sdxl": {
        "block_out_channels": [40, 80, 80],
        "norm_num_groups": 8,
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}


def config(checkpoint: str, component: str, **changes) -> dict:
    """The published config.json of a component, with changes."""
    return json.loads((PUBLISHED / checkpoint / component / "config.json").read_text()) | changes


def unet_config(checkpoint: str, **changes) -> dict:
    changes = {"cross_attention_dim": 48, "sample_size": 16, **_UNET[checkpoint]} | changes
    return config(checkpoint, "unet", **changes)


def vae_config(checkpoint: str) -> dict:
    return config(checkpoint, "vae", block_out_channels=[16, 32, 32, 64], norm_num_groups=8)


def text_config(checkpoint: str, component: str = "text_encoder") -> dict:
    small = {
        "vocab_size": 514,
        "hidden_size": 64 if component == "text_encoder_2" else 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "projection_dim": 24,
    }
    return config(checkpoint, component, torch_dtype="float32", **small)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter anew, norms, biases and zero-initialised ones included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.2 * noise + name.endswith("weight"))
    return model.eval()


def torch_unet(checkpoint: str) -> diffusers.UNet2DConditionModel:
    return randomise(diffusers.UNet2DConditionModel.from_config(unet_config(checkpoint)))


def torch_vae(checkpoint: str) -> diffusers.AutoencoderKL:
    return randomise(diffusers.AutoencoderKL.from_config(vae_config(checkpoint)))


def torch_text_encoder(
    checkpoint: str, component: str = "text_encoder"
) -> transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection:
    settings = text_config(checkpoint, component)
    model = getattr(transformers, settings["architectures"][0])
    return randomise(model(transformers.CLIPTextConfig(**settings)))


def torch_pipeline(tokenizer_folder: Path) -> diffusers.StableDiffusionPipeline:
    """A whole pipeline of two resolutions, 16 x 16 pixels, with a byte-level tokenizer."""
    small_unet = {
        "block_out_channels": [16, 24],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "sample_size": 8,
        # In files of before 0.9 diffusers takes a size below 64 for a mistake.
        "_diffusers_version": diffusers.__version__,
    }
    small_vae = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "sample_size": 16,
    }
    scheduler = json.loads((PUBLISHED / "sd15/scheduler/scheduler_config.json").read_text())
    return diffusers.StableDiffusionPipeline(
        vae=randomise(diffusers.AutoencoderKL.from_config(vae_config("sd15") | small_vae)),
        text_encoder=torch_text_encoder("sd15"),
        tokenizer=tokenizer(tokenizer_folder),
        unet=randomise(
            diffusers.UNet2DConditionModel.from_config(unet_config("sd15") | small_unet)
        ),
        scheduler=diffusers.PNDMScheduler.from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer(folder: Path, **settings) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer without a single merge: every byte is a token."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77} | settings))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def family_pipeline(checkpoint: str, folder: Path) -> diffusers.DiffusionPipeline:
    """A whole pipeline of the published structure and scheduler, but narrow; 128 x 128 pixels."""
    # In files of before 0.9 diffusers takes a size below 64 for a mistake.
    changes = {"_diffusers_version": diffusers.__version__}
    (folder / "tokenizer").mkdir()
    parts = {
        "vae": torch_vae(checkpoint),
        "text_encoder": torch_text_encoder(checkpoint),
        "tokenizer": tokenizer(folder / "tokenizer"),
    }
    kind = diffusers.StableDiffusionPipeline
    if checkpoint == "sdxl":
        kind, changes["cross_attention_dim"] = diffusers.StableDiffusionXLPipeline, 48 + 64
        (folder / "tokenizer_2").mkdir()
        parts["text_encoder_2"] = torch_text_encoder(checkpoint, "text_encoder_2")
        parts["tokenizer_2"] = tokenizer(folder / "tokenizer_2", pad_token="!")
        parts["force_zeros_for_empty_prompt"] = True
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    unet = diffusers.UNet2DConditionModel.from_config(unet_config(checkpoint, **changes))
    settings = json.loads((PUBLISHED / checkpoint / "scheduler/scheduler_config.json").read_text())
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    return kind(unet=randomise(unet), scheduler=scheduler, **parts)
