"""LoRA files: PyTorch diffusers' and kohya's in and out, peft's in.

Adapters here are ready to apply: their scale, alpha / rank, is in `b`. What a key says is in
`lora.keys`; the file format is safetensors' own: https://huggingface.co/docs/safetensors, "Format".
"""

import collections
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.lora.adapters import Adapters, kernels
from safetydpo_jax.lora.keys import PEFT_PREFIX, KeyReader, is_of_text_encoder
from safetydpo_jax.tensor_file import opened, write_tensors

_HEADER = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"
# peft's ways to begin that take the first A B out of the base model.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
Alphas = Callable[[str, int], float]  # (layer, rank) -> alpha


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
    ranks = {layer: len(a) for layer, (a, _) in layers.items()}
    rank = _usual(ranks)
    others = {layer: r for layer, r in ranks.items() if r != rank}
    config: dict[str, Any] = {
        "unet.r": rank,
        "unet.lora_alpha": rank,
        "unet.target_modules": list(layers),
    }
    if others:
        config |= {"unet.rank_pattern": others, "unet.alpha_pattern": others}
    header = {"format": "pt", _HEADER: json.dumps(config, indent=2, sort_keys=True)}
    return _write(path, tensors, {**(metadata or {}), **header})


def save_kohya(
    path: str | os.PathLike[str],
    adapters: Adapters,
    metadata: Mapping[str, str] | None = None,
    base: str | None = None,
) -> pathlib.Path:
    """Writes adapters with kohya's keys, which ComfyUI and A1111 read.

    Args:
      path: the file to write; its folder is made.
      adapters: ready to apply, of any rank a layer.
      metadata: more entries of the header, for people.
      base: kohya's name of the base model, as in "sd_v1"; A1111 lists the file for that one.
    """
    layers = _by_layer(adapters)
    tensors: dict[str, np.ndarray] = {}
    for layer, (a, b) in layers.items():
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
        header |= {"ss_base_model_version": base, "ss_v2": str(base.startswith("sd_v2"))}
    return _write(path, tensors, header)


def load_lora(
    path: str | os.PathLike[str], unet_params: Mapping[str, Any]
) -> tuple[Adapters, dict[str, str]]:
    """Reads a UNet's LoRA, in any of the formats that `lora.keys` lists.

    What a file has for text encoders is left out, with a warning that counts it.

    Args:
      path: the safetensors file. peft's needs its adapter_config.json beside it.
      unet_params: the UNet it is for, parameters or shapes; every key is checked against it.

    Returns:
      The adapters, ready to apply as "lora", and the header's entries for people.

    Raises:
      MissingFileError: there is no such file, or peft's lacks its config.
      UserError: not a whole safetensors file, or not a LoRA that fits this UNet.
    """
    path = pathlib.Path(path)
    with opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = dict(file.metadata() or {})
    if not tensors:
        raise UserError(f"{path}: the file holds no tensors; export it again")
    ours = sorted(key for key in tensors if not is_of_text_encoder(key))
    if not ours:
        raise UserError(f"{path}: all of its keys are for text encoders, none for the UNet")
    if left := len(tensors) - len(ours):
        said = f"{path}: {left} of {len(tensors)} tensors are for text encoders and are left out"
        warnings.warn(said, stacklevel=2)
    layers = kernels(unet_params)
    read, found = KeyReader(layers), collections.defaultdict(dict)
    for key in ours:
        tensor = tensors[key]
        try:
            layer, what = read(key)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if what in found[layer]:
            raise UserError(
                f"{path}: {key} is the second {what} of {layer}: is the file two LoRAs in one?"
            )
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {key} holds NaN or infinity: its training diverged")
        found[layer][what] = np.asarray(tensor, np.float32)
    alpha_of = _alphas(path, header, is_peft=any(key.startswith(PEFT_PREFIX) for key in tensors))
    flat = {}
    for layer, parts in found.items():
        if missing := {"a", "b"} - parts.keys():
            what = "lora_A (or down)" if "a" in missing else "lora_B (or up)"
            raise UserError(f"{path}: {layer} has no {what}; export the file again")
        module, kernel = layers[layer]
        a, b = _fit(parts["a"], parts["b"], kernel, f"{path}: {layer}")
        rank = len(b)
        alpha = float(parts["alpha"]) if "alpha" in parts else alpha_of(layer, rank)
        flat[(*module, "a")] = jnp.asarray(a)
        flat[(*module, "b")] = jnp.asarray(b * np.float32(alpha / rank))
    header.pop(_HEADER, None)
    return traverse_util.unflatten_dict(flat), header


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


def _fit(
    a: np.ndarray, b: np.ndarray, kernel: tuple[int, ...], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Our a (in, rank) or (kh, kw, in, rank) and b (rank, out), if that is what the layer takes.

    A projection is a linear layer in some versions of a model and a convolution of one pixel in
    others; so are its factors, and they mean the same.
    """
    *size, rows, columns = kernel
    single = tuple(size) in ((), (1, 1))
    if single and a.shape[2:] in ((), (1, 1)):
        a = a.reshape(*a.shape[:2], *size)
    if b.shape[2:] == (1, 1):
        b = b.reshape(b.shape[:2])
    if a.shape != (len(a), rows, *size) or b.shape[:1] != (columns,) or b.ndim != 2:
        raise UserError(
            f"{where} has factors of shape {a.shape} and {b.shape}, but the layer's kernel is "
            f"{kernel}: the file is for another base model"
        )
    if not len(a):
        raise UserError(f"{where} has factors of rank 0; export the file again")
    if len(a) != b.shape[1]:
        raise UserError(f"{where} has factors of different rank, {len(a)} and {b.shape[1]}")
    return (a.transpose(2, 3, 1, 0) if size else a.T), b.T


def _alphas(path: pathlib.Path, header: Mapping[str, str], *, is_peft: bool) -> Alphas:
    """Where no tensor says a layer's alpha: diffusers' header, peft's config, or else the rank."""
    if is_peft:
        file = path.with_name(_PEFT_CONFIG)
        if not file.is_file():
            raise MissingFileError(
                f"{file}: missing, and peft says there what alpha is: put it beside {path.name}"
            )
        where, text, prefix = str(file), file.read_text(), ""
    else:
        where, text, prefix = f"{path}: {_HEADER} in the header", header.get(_HEADER), "unet."
    try:
        config = json.loads(text or "{}")
        get = {key.removeprefix(prefix): value for key, value in config.items()}.get
        given = get("lora_alpha")
        usual = None if given is None else float(given)
        patterns = [
            (re.compile(rf"(.*\.)?({pattern})"), float(value))
            for pattern, value in (get("alpha_pattern") or {}).items()
        ]
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{where} is no LoRA's config ({error})") from None
    if get("use_dora"):
        raise UserError(f"{where} asks for use_dora, which is not supported")
    if str(get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{where}: with init_lora_weights {get('init_lora_weights')!r} the adapter goes with a "
            "changed base model; save it in peft with path_initial_model_for_weight_conversion, "
            "which makes a plain LoRA of it"
        )

    def alpha(layer: str, rank: int) -> float:
        value = next((v for pattern, v in patterns if pattern.fullmatch(layer)), usual)
        value = float(rank) if value is None else value
        return value * rank**0.5 if get("use_rslora") else value

    return alpha
