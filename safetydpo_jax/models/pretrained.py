"""Stable Diffusion pipelines: in, from checkpoints of either layout, and out to diffusers'."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safetydpo_jax.errors import MissingFileError, UserError, adding
from safetydpo_jax.models.checkpoint import open_checkpoint
from safetydpo_jax.models.pipeline import TOKENIZERS, Pipeline
from safetydpo_jax.models.state_dict import load_params, save_params
from safetydpo_jax.models.text_encoder import CLIPTextConfig

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def load_pipeline(
    path: str | pathlib.Path,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    vae: str = "",
    configs: str = "",
    unet_shardings: Callable[[Any], Any] | None = None,
    parts: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Pipeline:
    """Loads a Stable Diffusion checkpoint.

    Args:
      path: the checkpoint, and
      vae: another autoencoder for it, and
      configs: what a file is, all as `checkpoint.open_checkpoint` takes them.
      dtype: the type to hold the UNet's and the text encoders' parameters in, and to compute in;
        the autoencoder stays in float32, since half precision overflows in some of them.
      unet_shardings: from the tree of the UNet's shapes to one of shardings, to which its weights
        go straight from the disk; without it, all of them are on the default device.
      parts: the networks whose weights are wanted; by default all.
      progress: takes lines of text while large files are read.

    Raises:
      UserError, MissingFileError: a file or key is missing, unknown, damaged or not supported.
    """
    found, dtype = open_checkpoint(path, vae=vae, configs=configs), jnp.dtype(dtype)
    networks, types = found.in_type(dtype)
    params = {}
    sources = {
        "model_index": [found.folder / "model_index.json"],
        "scheduler": [found.folder / "scheduler" / "scheduler_config.json"],
    }
    for name, shapes in found.shapes.items():
        if parts is not None and name not in parts:
            continue
        weights = found.weights(name)
        sources[name] = [found.folders[name] / "config.json", *weights]
        alone = weights == [found.other_vae]
        sizes = f" (a single file is read in the sizes of {found.folders[name]})" if alone else ""
        with adding(sizes):
            params[name] = load_params(
                weights,
                shapes,
                types[name],
                unet_shardings(shapes) if unet_shardings and name == "unet" else None,
                name=name,
                table=found.tables.get(name),
                progress=progress,
            )
    tokenizers = []
    for encoder, name in TOKENIZERS.items():
        if encoder in networks:
            folder = found.folder / name
            tokenizers.append(_load_tokenizer(folder, networks[encoder].config))
            sources[name] = [file for file in folder.iterdir() if file.suffix in (".json", ".txt")]
    return Pipeline(
        networks, params, tokenizers, found.schedule, found.configs, found.place, sources
    )


def _load_tokenizer(folder: pathlib.Path, text: CLIPTextConfig) -> Any:
    from transformers import CLIPTokenizer

    # Without these files transformers builds an empty tokenizer and says nothing.
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    missing = [file for file in files if not file.is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise MissingFileError(f"{missing[0]}: missing; is the checkpoint complete?")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    except Exception as error:  # tokenizers, in Rust, raises nothing more specific
        raise UserError(f"{folder}: not a CLIP tokenizer ({error}); fetch it again") from error
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"{folder}: {len(tokenizer)} tokens, but the text encoder knows {text.vocab_size};"
            " the folders belong to different checkpoints"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    return tokenizer


def save_pipeline(pipeline: Pipeline, path: str | pathlib.Path, dtype: Any = jnp.float32) -> None:
    """Writes a checkpoint that diffusers' `DiffusionPipeline.from_pretrained` loads.

    Args:
      pipeline: what to write.
      path: a folder, made if needed; files of the same names are replaced.
      dtype: the type of the weights on disk.
    """
    folder = pathlib.Path(path)
    for name, tree in pipeline.params.items():
        file = "model.safetensors" if name in TOKENIZERS else WEIGHTS_FILE
        save_params(tree, folder / name / file, dtype)
        _write_json(folder / name / "config.json", pipeline.configs[name])
    _write_json(folder / "scheduler" / "scheduler_config.json", pipeline.configs["scheduler"])
    names = [name for encoder, name in TOKENIZERS.items() if encoder in pipeline.networks]
    for name, tokenizer in zip(names, pipeline.tokenizers, strict=True):
        tokenizer.save_pretrained(str(folder / name))
        # transformers 5 writes tokenizer.json alone; older readers want vocab.json and merges.txt.
        tokenizer.backend_tokenizer.model.save(str(folder / name))
    _write_json(folder / "model_index.json", _index(pipeline))


def _index(pipeline: Pipeline) -> dict[str, Any]:
    """The model_index.json of what is written: the one that was read may name more."""
    scheduler = pipeline.configs["scheduler"].get("_class_name", "DDIMScheduler")
    index: dict[str, Any] = {
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if pipeline.is_sdxl:
        return index | {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": pipeline.zeros_for_empty,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    return index | {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
