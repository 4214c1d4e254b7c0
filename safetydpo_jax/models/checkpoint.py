"""Where the parts of a Stable Diffusion checkpoint are, and what networks they are for.

In the diffusers layout a checkpoint is model_index.json and the folders unet, vae, text_encoder,
tokenizer and scheduler, in SDXL text_encoder_2 and tokenizer_2 too, each with its own config. In
the original layout it is one file (`single_file`).
"""

import dataclasses
import functools
import importlib.resources
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models import bucket, hub, single_file
from safetydpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from safetydpo_jax.models.pipeline import TOKENIZERS
from safetydpo_jax.models.state_dict import Table, find_weights
from safetydpo_jax.models.text_encoder import CLIPTextConfig, CLIPTextModel
from safetydpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from safetydpo_jax.tensor_file import PICKLES, opened

# Class in model_index.json -> the folders of its networks.
CLASSES = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}


@dataclasses.dataclass(eq=False)
class Checkpoint:
    """A checkpoint whose configs are read and whose weights are not.

    Attributes:
      place: the folder or the file.
      folder: the folder with its configs and tokenizers.
      folders: those of the networks' configs, by name; the autoencoder's may be elsewhere.
      configs: the parsed config files by folder ("unet", ..., "scheduler"), and "model_index".
      networks: the modules by name, without parameters.
      schedule: the noise schedule.
      other_vae: the folder or the file of an autoencoder that is not the checkpoint's own.
    """

    place: pathlib.Path
    folder: pathlib.Path
    folders: dict[str, pathlib.Path]
    configs: dict[str, dict[str, Any]]
    networks: dict[str, Any]
    schedule: NoiseSchedule
    other_vae: pathlib.Path | None = None

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        """The shapes of each network's parameters, by its name."""
        return param_shapes(self.networks)

    def in_type(self, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The networks that compute in a type, and what each is held in, by name.

        The autoencoder stays in float32, since half precision overflows in some of them.
        """
        types = {name: jnp.float32 if name == "vae" else dtype for name in self.networks}
        networks = {
            name: network if name == "vae" else network.clone(dtype=dtype)
            for name, network in self.networks.items()
        }
        return networks, types

    @functools.cached_property
    def tables(self) -> dict[str, Table]:
        """Of the networks that are in a single file, where; see `state_dict.read_params`."""
        found, vae = {}, self.other_vae
        if self.place.is_file():
            with opened(self.place) as tensors:
                found = single_file.tables(set(tensors.keys()), self.shapes)
        if vae is not None:
            found.pop("vae", None)
        if vae is not None and vae.is_file():
            with opened(vae) as tensors:
                table = single_file.vae_table(set(tensors.keys()), self.shapes["vae"])
            found |= {"vae": table} if table else {}
        return found

    def weights(self, name: str) -> Sequence[pathlib.Path]:
        """The files with the weights of a network; errors as of `state_dict.find_weights`."""
        if name == "vae" and self.other_vae and self.other_vae.is_file():
            return [self.other_vae]
        return [self.place] if name in self.tables else find_weights(self.folders[name])


def open_checkpoint(path: str | pathlib.Path, *, vae: str = "", configs: str = "") -> Checkpoint:
    """Finds a checkpoint, fetching it if need be, and reads its configs.

    Args:
      path: the checkpoint's folder in the diffusers layout, a .safetensors file in the original
        layout, either's address in a bucket like gs://bucket/folder, its id on the Hugging Face
        hub, or "emoji" for the embedded pipeline.
      vae: another autoencoder, as `resolve_vae` takes it; "" is the checkpoint's own.
      configs: what such a file is, `single_file.config_folder`; "" takes what it looks like.

    Raises:
      UserError, MissingFileError: a file is missing or damaged, or a config is not supported.
    """
    if configs:  # before anything is fetched
        single_file.named_configs(configs)
        if str(path) == "emoji" or pathlib.Path(path).suffix not in (".safetensors", *PICKLES):
            raise UserError(f"model_config is {configs}, but {path} has its own configs")
    other_vae = resolve_vae(vae) if vae else None  # the smaller one is fetched first
    place = resolve_checkpoint(path, lambda folder: _of_configs(folder, folder, other_vae))
    folder = single_file.config_folder(place, configs) if place.is_file() else place
    return _of_configs(place, folder, other_vae)


def _of_configs(
    place: pathlib.Path, folder: pathlib.Path, other_vae: pathlib.Path | None
) -> Checkpoint:
    """A checkpoint by the configs in a folder; errors as of `open_checkpoint`."""
    index = check_index(folder / hub.INDEX)
    folders = {name: folder / name for name in CLASSES[index["_class_name"]]}
    if other_vae and other_vae.is_dir():  # a file has no config: it is one of the same sizes
        folders["vae"] = other_vae
    read = {name: read_json(sub / "config.json") for name, sub in folders.items()}
    read["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    networks, schedule = build_networks(read, str(folder))
    read["model_index"] = index
    return Checkpoint(place, folder, folders, read, networks, schedule, other_vae)


def resolve_checkpoint(
    path: str | pathlib.Path, check_configs: Callable[[pathlib.Path], Any] = lambda folder: None
) -> pathlib.Path:
    """The place of a checkpoint: a diffusers directory or a .safetensors file.

    Args:
      path: either of them, the address of one in a bucket like gs://bucket/folder, a hub id, or
        "emoji", the embedded one. A hub id is one only where there is no such folder. What is
        elsewhere is fetched if need be (`models.bucket`, `models.hub`).
      check_configs: called with the folder of what is fetched, before its weights are.

    Raises:
      MissingFileError: there is no such folder, file or model, or no model_index.json in it.
      UserError: the model on the hub or in the bucket cannot be read, or the file is no whole
        safetensors file.
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
    if "://" in str(path) and folder.suffix not in PICKLES:
        folder = bucket.fetch_checkpoint(str(path), check_index, check_configs=check_configs)
    if folder.is_file() or folder.suffix in (".safetensors", *PICKLES):
        with opened(folder):
            return folder
    if not folder.exists() and hub.ID.fullmatch(str(path)):
        folder = hub.download(str(path), check_index, check_configs=check_configs)
    if not (folder / hub.INDEX).is_file():
        what = "no model_index.json in it" if folder.is_dir() else "no such folder"
        raise MissingFileError(
            f"{folder}: {what}; give a Stable Diffusion checkpoint in the diffusers layout, the id"
            " of one on the Hugging Face hub, a .safetensors file, or 'emoji'"
        )
    return folder


def resolve_vae(path: str | pathlib.Path) -> pathlib.Path:
    """The folder or the file of an autoencoder.

    Args:
      path: a folder with config.json in it, a checkpoint's, a .safetensors file with diffusers'
        names or the original ones, any of their addresses in a bucket, or a hub id such as
        "madebyollin/sdxl-vae-fp16-fix".

    Raises:
      MissingFileError: there is none.
      UserError: the model on the hub or in the bucket cannot be read, or the file is no whole
        safetensors file.
    """
    folder = pathlib.Path(path)
    if folder.suffix in (".safetensors", *PICKLES):
        if "://" in str(path) and folder.suffix not in PICKLES:
            folder = bucket.fetch_checkpoint(str(path), check_index)
        with opened(folder):
            return folder
    if "://" in str(path):
        try:
            found = bucket.fetch_checkpoint(str(path), read_json, index_name="config.json")
            if (found / "config.json").is_file():  # else offline, and what is here is a checkpoint
                return found
        except MissingFileError:
            pass
        return bucket.fetch_checkpoint(f"{path}/vae", read_json, index_name="config.json")
    if not folder.exists() and hub.ID.fullmatch(str(path)):
        return hub.download(str(path), read_json, index_name="config.json")
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file():
            return place
    what = "no config.json in it" if folder.is_dir() else "no such folder"
    what = "not a folder" if folder.is_file() else what
    raise MissingFileError(
        f"{path}: {what}; give an autoencoder's folder (diffusers layout), its .safetensors file "
        "or its hub id"
    )


def check_index(index: pathlib.Path) -> dict[str, Any]:
    """The content of a model_index.json; UserError unless it is of a supported pipeline."""
    content = read_json(index)
    if (kind := content.get("_class_name")) not in CLASSES:
        raise UserError(f"{index}: a {kind} is not supported; supported: {', '.join(CLASSES)}")
    return content


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
    configs: Mapping[str, dict[str, Any]], where: str = "."
) -> tuple[dict[str, Any], NoiseSchedule]:
    """The networks that the config files describe, without parameters, and the noise schedule.

    Args:
      configs: by folder: unet, vae, text_encoder, perhaps text_encoder_2, and scheduler.
      where: said in error messages.

    Raises:
      UserError: a config is not supported, or two of them do not fit each other.
    """
    unet = UNetConfig.from_dict(configs["unet"], f"{where}/unet/config.json")
    vae = AutoencoderConfig.from_dict(configs["vae"], f"{where}/vae/config.json")
    texts = {
        name: CLIPTextConfig.from_dict(configs[name], f"{where}/{name}/config.json")
        for name in TOKENIZERS
        if name in configs
    }
    width = sum(text.hidden_size for text in texts.values())
    fits: list[tuple[str, int | None, str, int]] = [
        (
            "in_channels",
            unet.in_channels,
            "the autoencoder's latent_channels are",
            vae.latent_channels,
        ),
        ("cross_attention_dim", unet.cross_attention_dim, "the text encoders' width is", width),
    ]
    if unet.addition_time_embed_dim is not None:
        pooled = list(texts.values())[-1].projection_dim or 0
        fits.append(
            (
                "projection_class_embeddings_input_dim",
                unet.projection_class_embeddings_input_dim,
                "6 x addition_time_embed_dim and the last text encoder's projection_dim make",
                6 * unet.addition_time_embed_dim + pooled,
            )
        )
    for key, size, source, wanted in fits:
        if size != wanted:
            raise UserError(
                f"{where}: the UNet's {key} is {size}, but {source} {wanted}; the folders "
                "belong to different checkpoints"
            )
    networks: dict[str, Any] = {"unet": UNet2DConditionModel(unet), "vae": AutoencoderKL(vae)}
    networks |= {name: CLIPTextModel(text) for name, text in texts.items()}
    return networks, NoiseSchedule.from_config(configs["scheduler"])


def init_inputs(networks: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Example inputs of each network, by its name, for `init` or `eval_shape`."""

    def of_unet(cfg: UNetConfig) -> tuple[Any, ...]:
        side = 2 ** (len(cfg.block_out_channels) - 1)
        inputs = (
            jnp.zeros((1, side, side, cfg.in_channels)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 2, cfg.cross_attention_dim)),
        )
        if cfg.addition_time_embed_dim is None or not cfg.projection_class_embeddings_input_dim:
            return inputs
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        return (*inputs, jnp.zeros((1, pooled)), jnp.zeros((1, 6)))

    def of_vae(cfg: AutoencoderConfig) -> tuple[Any, ...]:
        return (jnp.zeros((1, cfg.downscale, cfg.downscale, cfg.in_channels)),)

    def of_text(cfg: CLIPTextConfig) -> tuple[Any, ...]:
        return (jnp.zeros((1, 2), jnp.int32),)

    makers = {"unet": of_unet, "vae": of_vae}
    return {name: makers.get(name, of_text)(net.config) for name, net in networks.items()}


def param_shapes(networks: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of each network's parameters, by its name; nothing is computed."""
    return {
        name: jax.tree.map(lambda x: x, _param_shapes(name, network))  # dicts of the caller's own
        for name, network in networks.items()
    }


@functools.lru_cache(maxsize=16)  # tracing a large network takes seconds
def _param_shapes(name: str, network: Any) -> Any:
    inputs = init_inputs({name: network})[name]
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
