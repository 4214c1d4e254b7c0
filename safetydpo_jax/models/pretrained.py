"""A Stable Diffusion checkpoint in the diffusers directory layout, in and out.

A checkpoint is model_index.json and the folders unet, vae, text_encoder, tokenizer and scheduler,
each with its own config; `Pipeline` holds the five of them, ready to apply.
"""

import dataclasses
import functools
import importlib.resources
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models import hub
from safetydpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL, to_pixels
from safetydpo_jax.models.state_dict import load_params, save_params
from safetydpo_jax.models.text_encoder import CLIPTextConfig, CLIPTextModel
from safetydpo_jax.models.unet import UNet2DConditionModel, UNetConfig

_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@dataclasses.dataclass(eq=False)
class Pipeline:
    """The networks of a checkpoint with their parameters, its tokenizer and its noise schedule.

    Attributes:
      configs: the parsed config files by folder name ("unet", "vae", "text_encoder", "scheduler").
      path: the folder it was loaded from, or None.
    """

    unet: UNet2DConditionModel
    unet_params: dict[str, Any]
    vae: AutoencoderKL
    vae_params: dict[str, Any]
    text_encoder: CLIPTextModel
    text_params: dict[str, Any]
    tokenizer: Any
    schedule: NoiseSchedule
    configs: dict[str, dict[str, Any]]
    path: pathlib.Path | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the latents that the UNet was trained on."""
        size = self.unet.config.sample_size
        return (size, size, self.unet.config.in_channels)

    @property
    def resolution(self) -> int:
        """Pixels along one side of the pictures that the UNet was trained on."""
        return self.unet.config.sample_size * self.vae.config.downscale

    @functools.cached_property
    def _encode_text(self) -> Callable[..., Any]:
        def encode(params: Any, ids: Array) -> Array:
            output: Any = self.text_encoder.apply({"params": params}, ids)
            return output.last_hidden_state

        return jax.jit(encode)

    @functools.cached_property
    def _encode_pixels(self) -> Callable[..., Any]:
        def encode(params: Any, pictures: Array) -> tuple[Array, Array]:
            pixels = to_pixels(pictures)
            mean, logvar = self.vae.apply({"params": params}, pixels, method="encode")
            scale = self.vae.config.scaling_factor
            return mean * scale, logvar + 2.0 * np.log(scale)

        return jax.jit(encode)

    @functools.cached_property
    def _decode_latents(self) -> Callable[..., Any]:
        def decode(params: Any, latents: Array) -> Array:
            latents = latents / self.vae.config.scaling_factor
            pixels: Any = self.vae.apply({"params": params}, latents, method="decode")
            return jnp.round(jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)

        return jax.jit(decode)

    def encode_prompts(
        self, prompts: Sequence[str], *, batch_size: int = 64
    ) -> Float[np.ndarray, "n t d"]:
        """Text encoder states of prompts, padded or cut to the tokenizer's length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="np",
        )
        ids = np.asarray(tokens["input_ids"], np.int32)
        return _in_batches(lambda x: self._encode_text(self.text_params, x), ids, batch_size)

    def encode_images(
        self, pictures: UInt8[np.ndarray, "n h w 3"], *, batch_size: int = 32
    ) -> tuple[Float[np.ndarray, "n h2 w2 c"], Float[np.ndarray, "n h2 w2 c"]]:
        """Mean and log-variance of the pictures' latents, scaled by `scaling_factor`."""
        return _in_batches(lambda x: self._encode_pixels(self.vae_params, x), pictures, batch_size)

    def decode_latents(
        self, latents: Float[np.ndarray | Array, "n h w c"], *, batch_size: int = 32
    ) -> UInt8[np.ndarray, "n h2 w2 3"]:
        """Pictures of scaled latents."""
        decode = functools.partial(self._decode_latents, self.vae_params)
        return _in_batches(decode, np.asarray(latents), batch_size)


def _in_batches(fn: Callable[..., Any], x: np.ndarray, batch_size: int) -> Any:
    """Applies `fn` to slices of one size, so that one shape is compiled; joins the results."""
    if not len(x):
        raise UserError("nothing to encode or decode: the list is empty")
    size = min(batch_size, len(x))
    results = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
        results.append(jax.tree.map(np.asarray, fn(padded)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(x)], *results)


def resolve_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The folder of a checkpoint: a diffusers directory, a hub id, or "emoji", the embedded one.

    A hub id is one only where there is no such folder; it is fetched if need be (`models.hub`).

    Raises:
      MissingFileError: there is no such folder or model, or it holds no model_index.json.
      UserError: the model on the hub cannot be read.
    """
    if str(path) == "emoji":
        folder = pathlib.Path(
            str(importlib.resources.files("safetydpo_jax") / "emoji" / "pipeline")
        )
        if not folder.is_dir():
            raise MissingFileError(
                f"{folder}: the embedded model is not in this installation; make it with"
                " launch/pretrain.py --config configs/emoji_base.py and put WORKDIR/pipeline there,"
                " or give that folder as the model"
            )
        return folder
    folder = pathlib.Path(path)
    if not folder.exists() and hub.ID.fullmatch(str(path)):
        folder = hub.download(str(path), check_index)
    if not (folder / hub.INDEX).is_file():
        what = "no model_index.json in it" if folder.is_dir() else "no such folder"
        raise MissingFileError(
            f"{folder}: {what}; give a Stable Diffusion checkpoint in the diffusers layout, the id"
            " of one on the Hugging Face hub, or 'emoji'"
        )
    return folder


def check_index(index: pathlib.Path) -> None:
    """Raises UserError unless this model_index.json is of a pipeline that is supported."""
    kind = read_json(index).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise UserError(f"{index}: a {kind} is not supported; supported: StableDiffusionPipeline")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Parses a JSON object; UserError or MissingFileError says which file is at fault."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise MissingFileError(f"{file}: missing; is the checkpoint complete?") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object; fetch the file again")
    return content


def build_networks(
    configs: dict[str, dict[str, Any]], where: str = "."
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel, NoiseSchedule]:
    """The networks and the noise schedule that the config files describe, without parameters.

    Raises:
      UserError: a config is not supported, or two of them do not fit each other.
    """
    unet = UNetConfig.from_dict(configs["unet"], f"{where}/unet/config.json")
    vae = AutoencoderConfig.from_dict(configs["vae"], f"{where}/vae/config.json")
    text = CLIPTextConfig.from_dict(configs["text_encoder"], f"{where}/text_encoder/config.json")
    for key, size, source, wanted in (
        ("in_channels", unet.in_channels, "the autoencoder's latent_channels", vae.latent_channels),
        ("cross_attention_dim", unet.cross_attention_dim, "the text encoder's", text.hidden_size),
    ):
        if size != wanted:
            raise UserError(
                f"{where}: the UNet's {key} is {size}, but {source} size is {wanted}; the folders"
                " belong to different checkpoints"
            )
    schedule = NoiseSchedule.from_config(configs["scheduler"])
    return UNet2DConditionModel(unet), AutoencoderKL(vae), CLIPTextModel(text), schedule


def init_inputs(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel
) -> dict[str, tuple[Any, ...]]:
    """Example inputs of each network, by folder name, for `init` or `eval_shape`."""
    cfg = unet.config
    added = None
    if cfg.addition_time_embed_dim is not None and cfg.projection_class_embeddings_input_dim:
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        added = {"text_embeds": jnp.zeros((1, pooled)), "time_ids": jnp.zeros((1, 6))}
    side = 2 ** (len(cfg.block_out_channels) - 1)
    return {
        "unet": (
            jnp.zeros((1, side, side, cfg.in_channels)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 2, cfg.cross_attention_dim)),
            added,
        ),
        "vae": (
            jnp.zeros((1, vae.config.downscale, vae.config.downscale, vae.config.in_channels)),
        ),
        "text_encoder": (jnp.zeros((1, 2), jnp.int32),),
    }


def load_pipeline(
    path: str | pathlib.Path,
    dtype: Any = jnp.float32,
    *,
    unet_shardings: Callable[[Any], Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Pipeline:
    """Loads a Stable Diffusion checkpoint in the diffusers layout.

    Args:
      path: the checkpoint's folder, its id on the Hugging Face hub, or "emoji" for the embedded
        pipeline.
      dtype: the type to hold the UNet's and the text encoder's parameters in, and to compute in;
        the autoencoder stays in float32, since half precision overflows in some of them.
      unet_shardings: from the tree of the UNet's shapes to one of shardings, to which its weights
        go straight from the disk; without it, all of them are on the default device.
      progress: takes lines of text while large files are read.

    Raises:
      UserError, MissingFileError: a file or key is missing, unknown, damaged or not supported.
    """
    folder = resolve_checkpoint(path)
    check_index(folder / hub.INDEX)
    configs = {name: read_json(folder / name / "config.json") for name in _WEIGHTS}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    unet, vae, text_encoder, schedule = build_networks(configs, str(folder))
    unet, text_encoder = unet.clone(dtype=dtype), text_encoder.clone(dtype=dtype)
    networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    params = {}
    for name, inputs in init_inputs(unet, vae, text_encoder).items():
        shapes = jax.eval_shape(networks[name].init, jax.random.key(0), *inputs)["params"]
        kept = jnp.float32 if name == "vae" else dtype
        shardings = unet_shardings(shapes) if unet_shardings and name == "unet" else None
        params[name] = load_params(folder / name, shapes, kept, shardings, progress)
    tokenizer = _load_tokenizer(folder / "tokenizer", text_encoder.config)
    return Pipeline(
        unet,
        params["unet"],
        vae,
        params["vae"],
        text_encoder,
        params["text_encoder"],
        tokenizer,
        schedule,
        configs,
        folder,
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
    """Writes a checkpoint that `diffusers.StableDiffusionPipeline.from_pretrained` loads.

    Args:
      pipeline: what to write.
      path: a folder, made if needed; files of the same names are replaced.
      dtype: the type of the weights on disk.
    """
    folder = pathlib.Path(path)
    params = (pipeline.unet_params, pipeline.vae_params, pipeline.text_params)
    for (name, weights), tree in zip(_WEIGHTS.items(), params, strict=True):
        save_params(tree, folder / name / weights, dtype)
        _write_json(folder / name / "config.json", pipeline.configs[name])
    _write_json(folder / "scheduler" / "scheduler_config.json", pipeline.configs["scheduler"])
    pipeline.tokenizer.save_pretrained(str(folder / "tokenizer"))
    # transformers 5 writes tokenizer.json alone; older readers want vocab.json and merges.txt.
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.42.1",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": [
                "diffusers",
                pipeline.configs["scheduler"].get("_class_name", "DDIMScheduler"),
            ],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
