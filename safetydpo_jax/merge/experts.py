"""The experts of a merge: LoRA files that belong together, open and read layer by layer."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import kernels
from safetydpo_jax.lora.keys import BASE_HASH
from safetydpo_jax.lora.reader import LoraFile, opened_lora
from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer


class Experts:
    """Open LoRA files of one base model.

    Attributes:
      files: in the order given.
      hashes: sha256 of each file.
      names: of each for people: its category, or else the file's name; no two are the same.
      weights: what each one's change is multiplied by.
      places: of every layer that any expert changes, sorted: its path in the tree of parameters and
        its kernel's shape.
    """

    def __init__(
        self,
        files: Sequence[LoraFile],
        weights: Sequence[float],
        unet_params: Mapping[str, Any],
    ):
        self.files, self.weights = list(files), list(weights)
        self.hashes = [storage.hash_file(file.path) for file in files]
        for i, digest in enumerate(self.hashes):
            if (first := self.hashes.index(digest)) < i:
                raise UserError(
                    f"{files[i].path} and {files[first].path} are the same expert: give it once, "
                    "with a weight of its own if it is to count more"
                )
        known = {x.header[BASE_HASH]: x.path for x in files if x.header.get(BASE_HASH)}
        if len(known) > 1:
            one, other, *_ = known.values()
            raise UserError(
                f"{one} and {other} were trained on different base models ({BASE_HASH} in their "
                "headers): merge experts of one base"
            )
        names = [file.header.get("category") or file.path.stem for file in files]
        twice = {name for name in names if names.count(name) > 1}
        self.names = [f"{x} {i + 1}" if x in twice else x for i, x in enumerate(names)]
        layers = kernels(unet_params)
        found = sorted({layer for file in files for layer in file.ranks})
        self.places = {layer: layers[layer] for layer in found}

    @property
    def highest_rank(self) -> int:
        """Of any expert in any layer."""
        return max(rank for file in self.files for rank in file.ranks.values())

    def sum_of_ranks(self) -> int:
        """The rank with which the sum of all is exact in every layer."""
        return max(sum(file.ranks.get(layer, 0) for file in self.files) for layer in self.places)

    def layer(self, name: str, *, weighted: bool = True) -> Layer:
        """One layer of all of them.

        Args:
          name: its dotted path.
          weighted: whether the weights are applied.

        Raises:
          UserError: a file's factors hold NaN or do not fit the layer.
        """
        _, (*size, rows, columns) = self.places[name]
        found: list[Factors | None] = []
        for file, weight in zip(self.files, self.weights, strict=True):
            if name not in file.ranks:
                found.append(None)
                continue
            a, b = file.read(name)
            b = b * np.float32(weight) if weighted else b
            found.append(Factors(a.reshape(-1, a.shape[-1]), b))
        return Layer(name, (math.prod(size) * rows, columns), found)


@contextlib.contextmanager
def opened_experts(
    paths: Sequence[str | os.PathLike[str]],
    unet_params: Mapping[str, Any],
    weights: Sequence[float] | None = None,
) -> Iterator[Experts]:
    """Opens the experts and checks that they can be merged.

    Args:
      paths: LoRA files, in any format of `lora.keys`, of any ranks and layers.
      unet_params: of their base, parameters or shapes.
      weights: what each one's change is multiplied by; None is 1 for all.

    Raises:
      UserError, MissingFileError: a file cannot be read or does not fit the base, there is none,
        two are the same, their bases differ, or the weights are not one finite number each.
    """
    if not paths:
        raise UserError("no experts: give LoRA files, as in --experts hate.safetensors FILE ...")
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths):
        raise UserError(f"{len(weights)} weights for {len(paths)} experts: give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"the weights are {weights}: they must be finite numbers")
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(opened_lora(pathlib.Path(path), unet_params)) for path in paths
        ]
        yield Experts(files, weights, unet_params)
