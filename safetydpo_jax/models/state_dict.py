"""Flax parameters to and from a diffusers folder's safetensors.

One rule, no table: Linen names follow the PyTorch modules, so a parameter's path joined with "." is
its state-dict key; `kernel`, `scale` and `embedding` are called `weight` there; a Dense kernel (in,
out) is a transposed (out, in), a Conv kernel HWIO a transposed OIHW.
"""

import itertools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax import sharding
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.tensor_file import PICKLES, opened, write_tensors

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# A kernel's axes in PyTorch's order, by their number: linear layers and convolutions.
_TORCH_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
# Names that older files use for the autoencoder's attention.
_RENAMED = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
# transformers 5 writes CLIP's text encoder without the prefix that published checkpoints have.
_PREFIX = "text_model."
_SECONDS_BETWEEN_LINES = 5
ONLY_PICKLES = (
    "pickled weights can run code and are never read here, and there are no others; convert them "
    "once in PyTorch: pipeline.save_pretrained(folder, safe_serialization=True)"
)
# Buffers that some files carry and that hold nothing learnt.
_IGNORED = ("position_ids",)
# What autoencoders were trained with, and some merged checkpoints still have.
_OF_TRAINING = ("first_stage_model.loss.", "first_stage_model.model_ema.")
# What a text encoder's file may hold beyond what its config asks for: last layers that are not
# used, and what only the whole of CLIP has.
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
_OF_CLIP = ("text_projection.weight", "logit_scale")


Part = Callable[[np.ndarray], np.ndarray]


class Table(NamedTuple):
    """Where a file keeps parameters that it calls by other names.

    Attributes:
      entries: the file's key -> [(state-dict key, what of the tensor it is)].
      prefix: other keys that start so are unknown ones; the rest of the file is not looked at.
    """

    entries: dict[str, list[tuple[str, Part]]]
    prefix: str | None


def whole(x: np.ndarray) -> np.ndarray:
    """The `Part` that is all of a tensor."""
    return x


def torch_key(path: tuple[str, ...]) -> str:
    """The state-dict key of the parameter at `path`."""
    return ".".join((*path[:-1], _LEAVES[path[-1]]))


def _to_torch(leaf: str, x: np.ndarray) -> np.ndarray:
    return x.transpose(_TORCH_AXES[x.ndim]) if leaf == "kernel" else x


def _from_torch(leaf: str, x: np.ndarray) -> np.ndarray:
    return x.transpose(np.argsort(_TORCH_AXES[x.ndim])) if leaf == "kernel" else x


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of a parameter of that shape here."""
    return _to_torch(path[-1], np.broadcast_to(0, shape)).shape


def choose_weights(names: Iterable[str]) -> list[str]:
    """Those of a component folder's files that hold its weights, the index of shards first.

    Folders hold the weights in several forms. Safetensors are taken in full precision, or in half
    where there are no others; never pickles.
    """
    names = sorted(names)
    for variant, stem in itertools.product(("", ".fp16"), ("diffusion_pytorch_model", "model")):
        if (single := f"{stem}{variant}.safetensors") in names:
            return [single]
        if (index := f"{stem}.safetensors.index{variant}.json") in names:
            shard = re.compile(rf"{re.escape(stem + variant)}-\d+-of-\d+\.safetensors")
            return [index, *filter(shard.fullmatch, names)]
    return []


def find_weights(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a diffusers component folder, one or many shards.

    Raises:
      MissingFileError: there is none, or a shard that the index names is missing.
      UserError: only pickled weights are there, or the index names a file outside the folder.
    """
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if chosen := choose_weights(names):
        first = folder / chosen[0]
        return _shards(first) if first.suffix == ".json" else [first]
    if pickled := sorted(name for name in names if name.endswith(PICKLES)):
        raise UserError(f"{folder / pickled[0]}: {ONLY_PICKLES}")
    raise MissingFileError(
        f"{folder}: no .safetensors weights; is this a component folder of a diffusers checkpoint?"
    )


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    try:
        shards = {pathlib.PurePath(x) for x in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error}); download it again") from error
    for shard in sorted(shards):
        if shard.name != str(shard):
            raise UserError(
                f"{index}: names the file '{shard}' outside its folder; refusing to read it"
            )
        if not (index.parent / shard).is_file():
            raise MissingFileError(f"{index.parent / shard}: this shard of the weights is missing")
    return [index.parent / shard for shard in sorted(shards)]


def _tensors(
    files: Sequence[pathlib.Path], wants: Callable[[str], bool]
) -> Iterator[tuple[pathlib.Path, str, np.ndarray, float]]:
    """The wanted tensors, each with its file, its key and the share of all that is then read."""
    done, sizes = 0, []
    for file in files:
        with opened(file) as tensors:
            keys = filter(wants, tensors.keys())
            sizes.append({key: math.prod(tensors.shape(key)) for key in keys})
    total = sum(sum(of_file.values()) for of_file in sizes)
    for file, of_file in zip(files, sizes, strict=True):
        with opened(file) as tensors:
            for key, size in of_file.items():
                done += size
                yield file, key, tensors.read(key), done / max(total, 1)


def _modern_name(key: str, wanted: Mapping[str, Any]) -> str:
    if _PREFIX + key in wanted:
        return _PREFIX + key
    for old, new in _RENAMED.items():
        key = key.replace(old, new)
    return key


def read_params(
    files: Sequence[pathlib.Path],
    shapes: Mapping[str, Any],
    *,
    name: str = "weights",
    table: Table | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields each parameter's path and value, PyTorch's axes, tensor by tensor from the disk.

    Args:
      files: the safetensors files of CHECKPOINT/unet, say, or a checkpoint in one file.
      shapes: the "params" tree of `jax.eval_shape(model.init, ...)`.
      name: of the network, for lines of progress.
      table: where the file keeps what; None is diffusers' names, and nothing else in the files.
      progress: takes a line of text every few seconds.

    Raises:
      UserError: naming missing, unknown, misshapen or non-finite tensors, or an unreadable file.
    """
    expected: dict[tuple[str, ...], Any] = dict(flatten_dict(dict(shapes)))
    wanted = {torch_key(path): path for path in expected}
    unknown, told = [], time.monotonic()
    layers = {x[0] for key in wanted if (x := _TEXT_LAYER.match(key))}  # of a text encoder

    def wants(key: str) -> bool:
        if key.startswith(_OF_TRAINING):
            return False
        return table is None or key in table.entries or key.startswith(table.prefix or key + ".")

    for file, key, tensor, share in _tensors(files, wants):
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            progress(f"{name}: {share:.0%} read")
            told = time.monotonic()
        if table is None:
            parts = [(key if key in wanted else _modern_name(key, wanted), whole)]
        else:
            parts = table.entries.get(key, [(key, whole)])
        if not np.isfinite(tensor).all():
            raise UserError(f"{file}: '{key}' holds NaN or infinity; the checkpoint is damaged")
        for ours, part in parts:
            if ours not in wanted:
                if not key.endswith(_IGNORED) and not (layers and _is_unused(key, layers)):
                    unknown.append(key)
                continue
            path, value = wanted.pop(ours), part(tensor)
            if value.shape != (shape := torch_shape(path, expected[path].shape)):
                raise UserError(
                    f"{file}: '{key}' has shape {value.shape}, but its config.json asks for {shape}"
                )
            yield path, value
    missing = list(wanted)
    if table:  # under the names that are in the file
        missing = [k for k, parts in table.entries.items() if any(p in wanted for p, _ in parts)]
    for what, keys in (("lacks", sorted(missing)), ("has unknown", sorted(unknown))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            where = files[0] if table else files[0].parent
            raise UserError(
                f"{where}: the checkpoint {what} {', '.join(keys[:3])}{more}; do the weights"
                " belong to this config.json?"
            )


def _is_unused(key: str, layers: Set[str]) -> bool:
    """Whether a text encoder that has these layers, as its config says, may leave `key` out."""
    layer = _TEXT_LAYER.match(key)
    return key in _OF_CLIP if layer is None else layer[0] not in layers


def load_params(
    files: Sequence[pathlib.Path],
    shapes: Mapping[str, Any],
    dtype: Any,
    shardings: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Reads a network's parameters into the tree that `shapes` describes.

    Tensor by tensor: beside what is loaded, memory holds the largest tensor twice at most.

    Args:
      files: of the weights.
      shapes: the "params" tree of `jax.eval_shape(model.init, ...)`.
      dtype: the type to hold the parameters in.
      shardings: where each goes, a tree like `shapes`; None is the default device.
      **options: and errors, of `read_params`.
    """
    places: dict[tuple[str, ...], Any] = dict(flatten_dict(dict(shardings or {})))
    params = {}
    for path, value in read_params(files, shapes, **options):
        # All in NumPy until here: JAX would compile each transpose and check, shape by shape.
        value = np.asarray(_from_torch(path[-1], value), jnp.dtype(dtype), order="C")
        place = places.get(path)
        params[path] = sharding.put(value, place) if place else jax.device_put(value)
    return unflatten_dict(params)


def save_params(params: Mapping[str, Any], file: pathlib.Path, dtype: Any) -> None:
    """Writes parameters as one safetensors file under their PyTorch names; see `write_params`."""
    flat: dict[tuple[str, ...], Any] = dict(flatten_dict(dict(params)))
    values = ((path, _to_torch(path[-1], np.asarray(x))) for path, x in flat.items())
    write_params(values, params, file, dtype)


def write_params(
    values: Iterable[tuple[tuple[str, ...], np.ndarray]],
    shapes: Mapping[str, Any],
    file: pathlib.Path,
    dtype: Any,
) -> None:
    """Writes parameters as one safetensors file under their PyTorch names, one at a time.

    Args:
      values: each parameter's path and value, PyTorch's axes, in any order, as `read_params` has.
      shapes: the tree of all of them, or of their shapes.
      file: to write; its folder is made.
      dtype: the type to write them in.

    Raises:
      UserError: as of `write_tensors`.
    """
    flat: dict[tuple[str, ...], Any] = dict(flatten_dict(dict(shapes)))
    write_tensors(
        file,
        {torch_key(path): torch_shape(path, x.shape) for path, x in flat.items()},
        ((torch_key(path), value) for path, value in values),
        dtype=dtype,
        metadata={"format": "pt"},
    )
