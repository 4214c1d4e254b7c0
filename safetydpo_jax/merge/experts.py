"""The experts of a merge: LoRA files that belong together, open and read layer by layer."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import Adapters, kernels, routed
from safetydpo_jax.lora.keys import BASE_HASH
from safetydpo_jax.lora.reader import LoraFile, opened_lora
from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Layer

# Of one layer: (a, b) of all experts, (experts, ..., in, rank) and (experts, rank, out).
Stacked = tuple[Float[np.ndarray, "e *in r"], Float[np.ndarray, "e r out"]]


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

    def of_one_rank(self) -> list[str]:
        """The layers that all adapt, with the same rank."""
        ranks = {layer: {file.ranks.get(layer) for file in self.files} for layer in self.places}
        return [layer for layer, found in ranks.items() if len(found) == 1]

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

    def stacked(self, *, weighted: bool = True) -> dict[str, Stacked]:
        """All experts' factors by layer, filled up with zeros to the highest rank there."""
        found = {}
        for name, (_, kernel) in self.places.items():
            layer = self.layer(name, weighted=weighted)
            rank = max(x.rank for x in layer.present)
            a = np.zeros((len(layer.experts), layer.shape[0], rank), np.float32)
            b = np.zeros((len(layer.experts), rank, layer.shape[1]), np.float32)
            for i, factors in enumerate(layer.experts):
                if factors is not None:
                    a[i, :, : factors.rank], b[i, : factors.rank] = factors
            found[name] = a.reshape(len(a), *kernel[:-1], rank), b
        return found

    def routed(self, stacked: Mapping[str, Any], expert: Int[Any, " n"]) -> Adapters:
        """A "lora" collection that applies to each of n rows its own expert, to -1 none."""
        flat = {
            (*self.places[layer][0], leaf): x
            for layer, factors in stacked.items()
            for leaf, x in zip("ab", factors, strict=True)
        }
        return routed(traverse_util.unflatten_dict(flat), expert)

    def of_categories(self, categories: Sequence[str]) -> Int[np.ndarray, " n"]:
        """The expert whose name each category is, -1 without one."""
        return np.array([self.names.index(x) if x in self.names else -1 for x in categories])


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
