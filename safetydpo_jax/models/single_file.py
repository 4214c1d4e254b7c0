"""Checkpoints in one .safetensors file of the original layout, as civitai and ComfyUI have them.

Such a file holds the weights of all networks and nothing of their configs and tokenizers. Those are
shipped with the package for the published families, in the diffusers layout, and chosen by what is
in the file; a folder of the user's takes their place for a model of other sizes.
"""

import importlib.resources
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models.original_layout import (
    open_clip_name,
    original_unet_names,
    original_vae_names,
)
from safetydpo_jax.models.state_dict import Part, Table, torch_key, whole
from safetydpo_jax.tensor_file import opened

FAMILIES = ("sd15", "sd21-base", "sd21-768", "sdxl")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
# Where a text encoder may be, and whether open_clip's names are used there (else transformers').
_TEXT = {
    "text_encoder": {
        "cond_stage_model.transformer.": False,
        "conditioner.embedders.0.transformer.": False,
        "cond_stage_model.model.": True,
    },
    "text_encoder_2": {"conditioner.embedders.1.model.": True},
}
_CROSS = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def config_folder(file: pathlib.Path, configs: str = "") -> pathlib.Path:
    """The folder, in the diffusers layout, of the configs and tokenizers that go with a file.

    Args:
      file: the checkpoint.
      configs: one of `FAMILIES`, or such a folder; "" takes what the file looks like.

    Raises:
      UserError: the file is not readable or of no known family, or does not say which it is of.
      MissingFileError: there is no such folder.
    """
    return named_configs(configs) if configs else published(guess_family(file))


def named_configs(configs: str) -> pathlib.Path:
    """The folder of one of `FAMILIES`, or such a folder itself; errors as of `config_folder`."""
    if configs in FAMILIES:
        return published(configs)
    folder = pathlib.Path(configs)
    if not (folder / "model_index.json").is_file():
        raise MissingFileError(
            f"{folder}: no model_index.json there; model_config must be one of "
            f"{', '.join(FAMILIES)}, or a folder in the diffusers layout (its weights are not read)"
        )
    return folder


def published(name: str) -> pathlib.Path:
    """The shipped configs and tokenizers of one of `FAMILIES`, a folder without weights."""
    root = importlib.resources.files("safetydpo_jax") / "models" / "published"
    return pathlib.Path(str(root)) / name


def guess_family(file: pathlib.Path) -> str:
    """Which of `FAMILIES` a file is of, by its keys, shapes and metadata.

    Raises:
      UserError: it is not readable, of none of them, or of Stable Diffusion 2 without a word on
        what its UNet predicts.
    """
    with opened(file) as tensors:
        keys, about = set(tensors.keys()), tensors.metadata()
        width = tensors.shape(_CROSS)[-1] if _CROSS in keys else None
    velocity = "v_pred" in keys or about.get("modelspec.prediction_type") == "v"
    family = "sd15" if width == 768 else ""
    if any(key.startswith("conditioner.embedders.1.") for key in keys):
        family = "sdxl"
    if family and (velocity or any(key.startswith("edm_") for key in keys)):
        raise UserError(
            f"{file}: looks like {family}, but its UNet predicts something else: give a folder as "
            "model_config, configs in the diffusers layout whose scheduler_config.json says "
            "what (v_prediction, say)"
        )
    if family:
        return family
    if width == 1024:
        if "modelspec.prediction_type" in about or velocity:
            return "sd21-768" if velocity else "sd21-base"
        raise UserError(
            f"{file}: Stable Diffusion 2, and nothing in it says whether it predicts noise (512 px)"
            " or velocity (768 px): say so by model_config, sd21-base or sd21-768"
        )
    raise UserError(
        f"{file}: no Stable Diffusion 1.x, 2.x or XL checkpoint in the original layout; for others "
        "give a folder in the diffusers layout"
    )


def tables(keys: Set[str], shapes: Mapping[str, Any]) -> dict[str, Table]:
    """For each network, where its parameters are in a file.

    Args:
      keys: those of the file.
      shapes: the networks' parameters or their shapes, by name.
    """
    found = {}
    for name, tree in shapes.items():
        ours = [torch_key(path) for path in flatten_dict(dict(tree))]
        if name == "unet":
            found[name] = _renamed(_UNET, original_unet_names, ours)
        elif name == "vae":
            found[name] = _renamed(_VAE, original_vae_names, ours)
        else:
            found[name] = _of_text(_TEXT[name], ours, keys)
    return found


def vae_table(keys: Set[str], shapes: Mapping[str, Any]) -> Table | None:
    """Where an autoencoder's parameters are in a file; None if it has diffusers' names.

    Args:
      keys: those of the file, its own or a whole checkpoint's.
      shapes: the autoencoder's parameters or their shapes.
    """
    if any(key.startswith("encoder.down_blocks.") for key in keys):
        return None
    ours = [torch_key(path) for path in flatten_dict(dict(shapes))]
    prefix = _VAE if any(key.startswith(_VAE) for key in keys) else ""
    return _renamed(prefix, original_vae_names, ours)._replace(prefix=None)


def _renamed(
    prefix: str, names_of: Callable[[Iterable[str]], dict[str, str]], ours: Sequence[str]
) -> Table:
    names = names_of(key.rpartition(".")[0] for key in ours)
    entries = {}
    for key in ours:
        layer, _, kind = key.rpartition(".")
        entries[f"{prefix}{names[layer]}.{kind}"] = [(key, _without_pixels(key))]
    return Table(entries, prefix)


def _of_text(places: Mapping[str, bool], ours: Sequence[str], keys: Set[str]) -> Table:
    found = [prefix for prefix in places if any(key.startswith(prefix) for key in keys)]
    prefix = found[0] if found else next(iter(places))  # of none, all will be said to be missing
    wrapped = any(key.startswith(f"{prefix}text_model.") for key in keys)  # in most files
    entries: dict[str, list[tuple[str, Part]]] = {}
    for key in ours:
        if places[prefix]:
            theirs, third = open_clip_name(key)
            part = _transposed if theirs == "text_projection" else _third(third)
        else:
            theirs, part = key if wrapped else key.removeprefix("text_model."), whole
        entries.setdefault(prefix + theirs, []).append((key, part))
    return Table(entries, None)  # layers that are not used, as the last of Stable Diffusion 2's


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _third(which: int | None) -> Part:
    if which is None:
        return whole
    return lambda x: x[which * (len(x) // 3) : (which + 1) * (len(x) // 3)]


def _without_pixels(key: str) -> Part:
    """The autoencoder's attention has 1 x 1 convolutions there, linear layers here."""
    if ".attentions.0.to_" not in key or not key.endswith("weight"):
        return whole
    return lambda x: x[:, :, 0, 0] if x.ndim == 4 else x
