"""Adapters as LoRA files of PyTorch diffusers', kohya's and peft's.

Adapters here are ready to apply: their scale, alpha / rank, is in `b`.
"""

import collections
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from safetydpo_jax import storage
from safetydpo_jax.lora.adapters import Adapters, kernels
from safetydpo_jax.lora.keys import HEADER, PEFT_CONFIG, PEFT_PREFIX
from safetydpo_jax.models.original_layout import original_unet_names
from safetydpo_jax.tensor_file import write_tensors

_SDXL = "sdxl_base_v1-0"
_KOHYA_BASES = {768: "sd_v1", 1024: "sd_v2", 2048: _SDXL}  # by the width of the text states


class KohyaBase(NamedTuple):
    """A base model as kohya's scripts have it.

    Attributes:
      name: as in "sd_v1", by which A1111 knows whom to show a LoRA.
      layers: their names of its layers where they are not diffusers'. They load Stable Diffusion 1
        and 2 as diffusers does, XL as its original code, and pass by in silence what they do not
        know.
    """

    name: str
    layers: Mapping[str, str]


def save_lora(
    path: str | os.PathLike[str], adapters: Adapters, metadata: Mapping[str, str] | None = None
) -> pathlib.Path:
    """Writes adapters as one file that diffusers' `load_lora_weights` reads.

    As the scale is in B, the header says alpha = rank. With one rank for all layers that is also
    what readers take that know no header (diffusers before 0.35, most converters). The bytes are a
    function of the arguments alone, and the file appears whole or not at all.

    Args:
      path: the file to write; its folder is made.
      adapters: ready to apply, of any rank a layer.
      metadata: more entries of the header, for people.
    """
    layers = _by_layer(adapters)
    tensors = {}
    for layer, (a, b) in layers.items():
        tensors[f"unet.{layer}.lora_A.weight"] = a
        tensors[f"unet.{layer}.lora_B.weight"] = b
    config = {f"unet.{key}": value for key, value in _peft_config(layers).items()}
    header = {"format": "pt", HEADER: json.dumps(config, indent=2, sort_keys=True)}
    return _write(path, tensors, {**(metadata or {}), **header})


def save_kohya(
    path: str | os.PathLike[str],
    adapters: Adapters,
    metadata: Mapping[str, str] | None = None,
    base: KohyaBase | None = None,
) -> pathlib.Path:
    """Writes adapters with kohya's keys, which ComfyUI, A1111 and diffusers read.

    Args:
      path: the file to write; its folder is made.
      adapters: ready to apply, of any rank a layer.
      metadata: more entries of the header, for people.
      base: from `kohya_base`; A1111 lists the file for that one.
    """
    layers = _by_layer(adapters)
    tensors: dict[str, np.ndarray] = {}
    for layer, (a, b) in layers.items():
        layer = base.layers.get(layer, layer) if base else layer
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = a
        tensors[f"{name}.lora_up.weight"] = b
        tensors[f"{name}.alpha"] = np.array(len(a), np.float32)  # the scale is in lora_up
    rank = str(_usual({layer: len(a) for layer, (a, _) in layers.items()}))
    header = {
        **(metadata or {}),
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
    }
    if base:
        header |= {"ss_base_model_version": base.name, "ss_v2": str(base.name.startswith("sd_v2"))}
    return _write(path, tensors, header)


def kohya_base(unet_params: Mapping[str, Any]) -> KohyaBase | None:
    """What the base is to kohya's scripts, by its UNet; None for what they have no name of.

    Args:
      unet_params: parameters or shapes.
    """
    layers = kernels(unet_params)
    widths = [k[-2] for name, (_, k) in layers.items() if name.endswith("attn2.to_k")]
    name = _KOHYA_BASES.get(widths[0]) if widths else None
    if name is None:
        return None
    return KohyaBase(name, original_unet_names(layers) if name == _SDXL else {})


def save_peft(
    path: str | os.PathLike[str], adapters: Adapters, metadata: Mapping[str, str] | None = None
) -> pathlib.Path:
    """Writes adapters as a folder that peft's `PeftModel.from_pretrained(unet, path)` reads.

    Args:
      path: the folder; it is made.
      adapters: ready to apply, of any rank a layer.
      metadata: more entries of the header, for people.

    Returns:
      The file with the weights.
    """
    layers, folder = _by_layer(adapters), pathlib.Path(path)
    tensors = {}
    for layer, (a, b) in layers.items():
        tensors[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = a
        tensors[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        **_peft_config(layers),
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with storage.explained_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_file(folder / PEFT_CONFIG, text.encode())
    return _write(
        folder / "adapter_model.safetensors", tensors, {**(metadata or {}), "format": "pt"}
    )


def _peft_config(layers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Ranks, and alphas that are the same; what is not the usual one by layer."""
    ranks = {layer: len(a) for layer, (a, _) in layers.items()}
    rank = _usual(ranks)
    config = {"r": rank, "lora_alpha": rank, "target_modules": list(layers)}
    others = {layer: r for layer, r in ranks.items() if r != rank}
    return config | ({"rank_pattern": others, "alpha_pattern": others} if others else {})


def _write(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> pathlib.Path:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return write_tensors(pathlib.Path(path), shapes, tensors.items(), metadata=header)


def _by_layer(adapters: Adapters) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """PyTorch's A (rank, in) or (rank, in, kh, kw) and B of every layer, by dotted path, sorted."""
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    layers = {}
    for module in sorted({path[:-1] for path in flat}):
        a, b = (np.asarray(flat[(*module, leaf)], np.float32) for leaf in "ab")
        if a.ndim == 4:  # of a convolution: B is one of a single pixel
            layers[".".join(module)] = a.transpose(3, 2, 0, 1), b.T[:, :, None, None]
        else:
            layers[".".join(module)] = a.T, b.T
    return layers


def _usual(ranks: Mapping[str, int]) -> int:
    return collections.Counter(ranks.values()).most_common(1)[0][0]
