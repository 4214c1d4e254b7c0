"""LoRA files of PyTorch diffusers (`pytorch_lora_weights.safetensors`), and of kohya for ComfyUI.

diffusers' keys are `unet.<module>.lora_A.weight` (rank, in) and `unet.<module>.lora_B.weight`
(out, rank); the older `.lora.down.weight` / `.lora.up.weight` are read too. kohya's are
`lora_unet_<module, _ for .>` with `.lora_down.weight`, `.lora_up.weight` and `.alpha`. The file
format is safetensors' own: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.lora.adapters import Adapters

_KEY = re.compile(r"unet\.(?P<module>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up)\.weight")
_LEAF = {"lora_A": "a", "lora.down": "a", "lora_B": "b", "lora.up": "b"}
_HEADER = "lora_adapter_metadata"


def save_lora(
    path: str | os.PathLike[str],
    adapters: Adapters,
    alpha: float,
    metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes adapters as one file that diffusers' `load_lora_weights` reads.

    The scale alpha / rank is multiplied into B and the header says alpha = rank, because readers
    that know no header (diffusers before 0.35, most converters) take alpha = rank. The bytes are a
    function of the arguments alone, and the file appears whole or not at all.

    Args:
      path: the file to write; its folder is made.
      adapters: as trained, b not yet scaled.
      alpha: the LoRA's alpha.
      metadata: more entries of the header, for people.
    """
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(adapters))
    modules = sorted({path[:-1] for path in flat})
    tensors, rank = {}, flat[(*modules[0], "a")].shape[1]
    for module in modules:
        a, b = (np.asarray(flat[(*module, leaf)], np.float32) for leaf in "ab")
        name = ".".join(("unet", *module))
        tensors[f"{name}.lora_A.weight"] = a.T
        tensors[f"{name}.lora_B.weight"] = (b * np.float32(alpha / rank)).T
    config = {
        "unet.r": rank,
        "unet.lora_alpha": rank,
        "unet.target_modules": [".".join(module) for module in modules],
    }
    header = {"format": "pt", _HEADER: json.dumps(config, indent=2, sort_keys=True)}
    return _write(pathlib.Path(path), tensors, {**(metadata or {}), **header})


def to_kohya(
    path: str | os.PathLike[str], target: str | os.PathLike[str], base: str | None = None
) -> pathlib.Path:
    """Writes a file of `save_lora`'s with kohya's keys, which ComfyUI and A1111 read.

    Args:
      path: the diffusers file.
      target: the file to write; its folder is made.
      base: kohya's name of the base model, as in "sd_v1"; A1111 lists the file for that one.
    """
    tensors, header = _read(pathlib.Path(path))
    rank = json.loads(header[_HEADER])["unet.r"]
    renamed: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        assert match is not None, key  # our own file
        name = f"lora_unet_{match['module'].replace('.', '_')}"
        if _LEAF[match["side"]] == "a":
            renamed[f"{name}.lora_down.weight"] = tensor
            # B holds the scale already, so alpha is the rank.
            renamed[f"{name}.alpha"] = np.array(rank, np.float32)
        else:
            renamed[f"{name}.lora_up.weight"] = tensor
    header = {k: v for k, v in header.items() if k != _HEADER}
    header |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }
    if base:
        header |= {"ss_base_model_version": base, "ss_v2": str(base.startswith("sd_v2"))}
    return _write(pathlib.Path(target), renamed, header)


def load_lora(
    path: str | os.PathLike[str], unet_params: Mapping[str, Any]
) -> tuple[Adapters, dict[str, str]]:
    """Reads a diffusers LoRA file into a collection that is ready to apply as "lora".

    Args:
      path: the safetensors file.
      unet_params: the UNet it is for, parameters or shapes; every key is checked against it.

    Returns:
      The adapters, b already multiplied by alpha / rank, and the header's entries.

    Raises:
      MissingFileError: there is no such file.
      UserError: not a whole safetensors file, or not a LoRA that fits this UNet.
    """
    path = pathlib.Path(path)
    tensors, header = _read(path)
    alpha = _alpha(path, header)
    kernels: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(unet_params))
    layers = {
        ".".join(module): (tuple(module), np.shape(leaf))
        for (*module, name), leaf in kernels.items()
        if name == "kernel" and np.ndim(leaf) == 2
    }
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for key, tensor in sorted(tensors.items()):
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in layers:
            raise UserError(
                f"{path}: the key {key!r} names no linear layer of this UNet in diffusers' LoRA "
                "format; is the file for another base model, or in another tool's format?"
            )
        module, (rows, columns) = layers[match["module"]]
        leaf = _LEAF[match["side"]]
        rank = tensor.shape[0 if leaf == "a" else -1]
        expected = (rank, rows) if leaf == "a" else (columns, rank)
        if tensor.shape != expected:
            raise UserError(
                f"{path}: {key} has shape {tensor.shape}, but for a layer of {rows} x {columns} it "
                f"must be {expected}: the file is for another base model"
            )
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {key} holds NaN or infinity: its training diverged")
        flat[(*module, leaf)] = tensor.T.astype(np.float32)
    for module in sorted({path[:-1] for path in flat}):
        a, b = (flat.get((*module, leaf)) for leaf in "ab")
        name = ".".join(module)
        if a is None or b is None:
            raise UserError(f"{path}: {name} has only one of lora_A and lora_B; export it again")
        if a.shape[1] != b.shape[0]:
            raise UserError(f"{path}: {name} has lora_A and lora_B of different rank")
        if alpha is not None:
            flat[(*module, "b")] = b * np.float32(alpha / a.shape[1])
    return traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in flat.items()}), header


def _alpha(path: pathlib.Path, header: Mapping[str, str]) -> float | None:
    """The alpha that diffusers wrote to the header; None stands for the rank."""
    try:
        config = json.loads(header.get(_HEADER) or "{}")
    except ValueError as error:
        raise UserError(f"{path}: {_HEADER} in the header is not JSON ({error})") from None
    for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if config.get(f"unet.{key}"):
            raise UserError(f"{path}: the header asks for {key}, which is not supported")
    return config.get("unet.lora_alpha")


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such LoRA file; give the path of a .safetensors file")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UserError(
            f"{path}: pickle files can run code and are not read; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'lora.safetensors')"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); copy or export it again"
        ) from None
    if not tensors:
        raise UserError(f"{path}: the file holds no tensors; export it again")
    return tensors, header


def _write(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(_serialize(tensors, metadata))
    partial.replace(path)
    return path


def _serialize(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes; the library's own writer shuffles the header's entries at every run."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks, offset = [], 0
    for name, array in sorted(tensors.items()):
        data = np.ascontiguousarray(array, "<f4").tobytes()
        span = [offset, offset + len(data)]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *chunks])
