"""LoRA files of diffusers', peft's and kohya's, read layer by layer.

Adapters here are ready to apply: their scale, alpha / rank, is in `b`. What a key says is in
`lora.keys`.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.lora.adapters import Adapters, kernels
from safetydpo_jax.lora.keys import (
    HEADER,
    PEFT_CONFIG,
    PEFT_PREFIX,
    KeyReader,
    OtherBaseError,
    is_of_text_encoder,
)
from safetydpo_jax.tensor_file import TensorFile, opened

# peft's ways to begin that take the first A B out of the base model.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
Alphas = Callable[[str, int], float]  # (layer, rank) -> alpha


class LoraFile:
    """An open LoRA file, its keys checked; its layers are read when they are asked for.

    Attributes:
      path: the file.
      header: the entries for people.
      ranks: of every layer it has, by dotted path, in the file's order.
    """

    def __init__(
        self,
        path: pathlib.Path,
        tensors: TensorFile,
        layers: Mapping[str, tuple[tuple[str, ...], Any]],
    ):
        self.path, self._tensors, self._layers = path, tensors, layers
        self.header = tensors.metadata()
        keys = tensors.keys()
        if not keys:
            raise UserError(f"{path}: the file holds no tensors; export it again")
        ours = sorted(key for key in keys if not is_of_text_encoder(key))
        if not ours:
            raise UserError(f"{path}: all of its keys are for text encoders, none for the UNet")
        if left := len(keys) - len(ours):
            said = f"{path}: {left} of {len(keys)} tensors are for text encoders and are left out"
            warnings.warn(said, stacklevel=4)
        read, self._found = KeyReader(layers), collections.defaultdict(dict)
        for key in ours:
            try:
                layer, what = read(key)
            except UserError as error:
                raise type(error)(f"{path}: {error}") from None
            if what in self._found[layer]:
                raise UserError(
                    f"{path}: {key} is the second {what} of {layer}: is the file two LoRAs in one?"
                )
            self._found[layer][what] = key
        is_peft = any(key.startswith(PEFT_PREFIX) for key in keys)
        self._alpha_of = _alphas(path, self.header, is_peft=is_peft)
        self.header.pop(HEADER, None)
        self.ranks: dict[str, int] = {}
        for layer, parts in self._found.items():
            if missing := {"a", "b"} - parts.keys():
                what = "lora_A (or down)" if "a" in missing else "lora_B (or up)"
                raise UserError(f"{path}: {layer} has no {what}; export the file again")
            for what, key in parts.items():
                shape = tensors.shape(key)
                if math.prod(shape) != 1 if what == "alpha" else len(shape) < 2:
                    raise UserError(f"{path}: {key} has the shape {shape}: export the file again")
            self.ranks[layer] = tensors.shape(parts["a"])[0]

    def check(self, layer: str) -> None:
        """Raises UserError unless the factors fit the layer; reads none of them."""
        a, b = (
            np.broadcast_to(np.float32(0), self._tensors.shape(self._found[layer][what]))
            for what in "ab"
        )
        _fit(a, b, self._layers[layer][1], f"{self.path}: {layer}")

    def read(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """A layer's `a`, (in, rank) or (kh, kw, in, rank), and its `b` (rank, out); float32.

        Raises:
          UserError: they hold NaN or do not fit the layer.
        """
        parts = {}
        for what, key in self._found[layer].items():
            tensor = self._tensors.read(key)
            if not np.isfinite(tensor).all():
                raise UserError(f"{self.path}: {key} holds NaN or infinity: its training diverged")
            parts[what] = np.asarray(tensor, np.float32)
        _, kernel = self._layers[layer]
        a, b = _fit(parts["a"], parts["b"], kernel, f"{self.path}: {layer}")
        rank = len(b)
        alpha = float(parts["alpha"].item()) if "alpha" in parts else self._alpha_of(layer, rank)
        return a, b * np.float32(alpha / rank)


@contextlib.contextmanager
def opened_lora(path: str | os.PathLike[str], unet_params: Mapping[str, Any]) -> Iterator[LoraFile]:
    """A UNet's LoRA, in any of the formats that `lora.keys` lists, to be read layer by layer.

    What a file has for text encoders is left out, with a warning that counts it.

    Args:
      path: the safetensors file. peft's needs its adapter_config.json beside it.
      unet_params: the UNet it is for, parameters or shapes; every key is checked against it.

    Raises:
      MissingFileError: there is no such file, or peft's lacks its config.
      UserError: not a whole safetensors file, or not a LoRA that fits this UNet.
    """
    path = pathlib.Path(path)
    with opened(path) as tensors:
        yield LoraFile(path, tensors, kernels(unet_params))


def load_lora(
    path: str | os.PathLike[str], unet_params: Mapping[str, Any]
) -> tuple[Adapters, dict[str, str]]:
    """All of a UNet's LoRA.

    Args:
      path: as `opened_lora` takes it, and
      unet_params: too; so are the errors.

    Returns:
      The adapters, ready to apply as "lora", and the header's entries for people.
    """
    places, flat = kernels(unet_params), {}
    with opened_lora(path, unet_params) as file:
        for layer in file.ranks:
            module, _ = places[layer]
            for leaf, value in zip("ab", file.read(layer), strict=True):
                flat[(*module, leaf)] = jnp.asarray(value)
    return traverse_util.unflatten_dict(flat), file.header


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
        raise OtherBaseError(
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
        file = path.with_name(PEFT_CONFIG)
        if not file.is_file():
            raise MissingFileError(
                f"{file}: missing, and peft says there what alpha is: put it beside {path.name}"
            )
        where, text, prefix = str(file), file.read_text(errors="replace"), ""
    else:
        where, text, prefix = f"{path}: {HEADER} in the header", header.get(HEADER), "unet."
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
