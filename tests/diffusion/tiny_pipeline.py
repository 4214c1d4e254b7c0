"""A whole Stable Diffusion checkpoint of a few thousand random numbers, in the diffusers layout."""

import json
import string
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import CLIPTokenizer

import safetydpo_jax
from safetydpo_jax.models.checkpoint import build_networks, param_shapes
from safetydpo_jax.models.pipeline import TOKENIZERS, Pipeline
from safetydpo_jax.models.pretrained import save_pipeline

PUBLISHED = Path(safetydpo_jax.__file__).parent / "models" / "published"
# What differs from the published files; of SDXL beside that.
CHANGES = {
    "unet/config.json": {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "sample_size": 8,
        "_diffusers_version": "0.42.1",
    },
    "vae/config.json": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    "text_encoder/config.json": {
        "vocab_size": 54,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 52,
        "eos_token_id": 53,
    },
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
}
SDXL_CHANGES = CHANGES | {
    "unet/config.json": CHANGES["unet/config.json"]
    | {
        "cross_attention_dim": 32,
        "attention_head_dim": [2, 2],
        "transformer_layers_per_block": [1, 1],
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    },
    "text_encoder_2/config.json": CHANGES["text_encoder/config.json"] | {"projection_dim": 8},
    "scheduler/scheduler_config.json": {},
}


def write_tiny_pipeline(folder: Path, family: str = "sd15") -> Path:
    """Writes the checkpoint; 8x8x4 latents, 16x16 px pictures, prompts of 12 letters."""
    configs = {
        name.split("/")[0]: json.loads((PUBLISHED / family / name).read_text()) | changes
        for name, changes in (SDXL_CHANGES if family == "sdxl" else CHANGES).items()
    }
    networks, schedule = build_networks(configs)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            noise /= np.prod(leaf.shape[:-1]) ** 0.5
        else:
            noise = 0.1 * noise + (path[-1].key == "scale")
        return jnp.asarray(noise, jnp.float32)

    params = {
        name: jax.tree_util.tree_map_with_path(draw, shapes)
        for name, shapes in param_shapes(networks).items()
    }
    names = [name for encoder, name in TOKENIZERS.items() if encoder in networks]
    tokenizers = [write_letter_tokenizer(folder / name) for name in names]
    pipeline = Pipeline(networks, params, tokenizers, schedule, configs)
    save_pipeline(pipeline, folder)
    return folder


def write_letter_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose tokens are the letters a to z, inside and at the end of a word."""
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocabulary = [*letters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )
