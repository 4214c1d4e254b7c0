"""Which expert is the most active where, and what the layers see: counted once, kept in a file.

A vote is one token of one prompt at one step of a drawing of it. Kept apart are the
category of the prompt, the band of timesteps and the half of the prompts, so that a merge can weigh
them anew, and the two halves say how far the winners can be relied on.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.layer import Inputs, Votes
from safetydpo_jax.tensor_file import opened, write_tensors

_HEADER = "safetydpo_statistics"
Counts = Float[np.ndarray, "half category band expert _"]


@dataclasses.dataclass
class Statistics:
    """Votes on every layer.

    Attributes:
      experts: sha256 of the files, in the order of the counts' axis.
      categories: of the prompts.
      outputs: by layer, votes on its outputs.
      ranks: by layer, votes on the experts' rank units; only layers in which ranks are one.
      about: how they were made: prompts' number and hash, sampler, steps, who drew.
      inputs: by layer, second moments of its inputs; empty if they were not asked for.
    """

    experts: list[str]
    categories: list[str]
    outputs: dict[str, Counts]
    ranks: dict[str, Counts]
    about: dict[str, object]
    inputs: dict[str, Inputs] = dataclasses.field(default_factory=dict)

    def votes(
        self, weights: Mapping[str, float] | None = None, bands: Sequence[float] | None = None
    ) -> dict[str, Votes]:
        """By layer, the votes summed over what is kept apart.

        Args:
          weights: of the prompts' categories; 1 for those not named.
          bands: weights of the bands of timesteps, from noisy to clean; None is 1 for all.

        Raises:
          UserError: as of `vote_weights`.
        """
        count = len(next(iter(self.outputs.values()))[0, 0])
        factors, of_bands = vote_weights(self.categories, count, weights, bands)

        def summed(counts: Counts) -> Float[np.ndarray, "expert unit"]:
            return np.einsum("hcbeu,c,b->eu", counts.astype(np.float64), factors, of_bands)

        return {
            layer: Votes(summed(counts), summed(self.ranks[layer]) if layer in self.ranks else None)
            for layer, counts in self.outputs.items()
        }

    def settled(self) -> dict[str, Bool[np.ndarray, " out"]]:
        """By layer, which outputs have the same winner by either half of the prompts."""
        halves = {layer: counts.sum((1, 2)).argmax(1) for layer, counts in self.outputs.items()}
        return {layer: first == second for layer, (first, second) in halves.items()}

    def agreement(self) -> float:
        """The share of outputs whose winner is the same by either half of the prompts."""
        same = list(self.settled().values())
        return float(np.concatenate(same).mean()) if same else 0.0

    def ordered(self, experts: Sequence[str], where: str = "the statistics") -> "Statistics":
        """The same for experts in another order.

        Args:
          experts: sha256 of their files.
          where: said in the error.

        Raises:
          UserError: they are of other experts.
        """
        if sorted(experts) != sorted(self.experts):
            raise UserError(
                f"{where}: the votes are of other experts than these {len(experts)} "
                f"({len(set(experts) & set(self.experts))} of its {len(self.experts)} are among "
                "them): make the statistics anew, without --stats"
            )
        order = [self.experts.index(digest) for digest in experts]
        tables = [
            {layer: counts[:, :, :, order] for layer, counts in table.items()}
            for table in (self.outputs, self.ranks)
        ]
        inputs = {
            layer: dataclasses.replace(x, images=[x.images[i] for i in order])
            for layer, x in self.inputs.items()
        }
        return dataclasses.replace(
            self, experts=list(experts), outputs=tables[0], ranks=tables[1], inputs=inputs
        )

    def save(self, path: pathlib.Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        tensors = {f"outputs.{layer}": counts for layer, counts in self.outputs.items()}
        tensors |= {f"ranks.{layer}": counts for layer, counts in self.ranks.items()}
        for layer, x in self.inputs.items():
            tensors[f"harmful.{layer}"], tensors[f"harmless.{layer}"] = x.harmful, x.harmless
            for i, image in enumerate(x.images):
                if image is not None:
                    tensors[f"image {i}.{layer}"] = image
        said = {"experts": self.experts, "categories": self.categories, "about": self.about}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        write_tensors(path, shapes, tensors.items(), metadata={_HEADER: json.dumps(said)})


def vote_weights(
    categories: Sequence[str],
    num_bands: int,
    weights: Mapping[str, float] | None,
    bands: Sequence[float] | None,
) -> tuple[Float[np.ndarray, " category"], Float[np.ndarray, " band"]]:
    """What a vote counts by its category, and by its band of timesteps; as of `Statistics.votes`.

    Raises:
      UserError: there is no such category, not as many bands, or a weight below 0.
    """
    weights = weights or {}
    if unknown := [name for name in weights if name not in categories]:
        raise UserError(
            f"no prompts of {', '.join(unknown)} vote: the categories are {', '.join(categories)}"
        )
    bands = [1.0] * num_bands if bands is None else list(bands)
    if len(bands) != num_bands:
        raise UserError(f"{len(bands)} weights for {num_bands} bands of timesteps: give one each")
    if not all(0 <= x < float("inf") for x in (*weights.values(), *bands)):
        raise UserError("weights of votes must be finite and at least 0")
    factors = np.array([weights.get(name, 1.0) for name in categories])
    if not (factors.any() and any(bands)):
        raise UserError("the weights of all votes are 0: nobody would win")
    return factors, np.array(bands)


def load_statistics(path: pathlib.Path) -> Statistics:
    """Reads what `Statistics.save` wrote.

    Raises:
      MissingFileError: there is no such file.
      UserError: it holds no statistics, or is damaged.
    """
    with opened(path) as file:
        header = file.metadata()
        if _HEADER not in header:
            raise UserError(f"{path}: holds no statistics of a merge: is it a LoRA?")
        tables = file.tables()
    said = json.loads(header[_HEADER])
    inputs = {
        layer: Inputs(
            harmful,
            tables["harmless"][layer],
            [tables[f"image {i}"].get(layer) for i in range(len(said["experts"]))],
        )
        for layer, harmful in tables["harmful"].items()
    }
    return Statistics(
        said["experts"],
        said["categories"],
        dict(tables["outputs"]),
        dict(tables["ranks"]),
        said["about"],
        inputs,
    )
