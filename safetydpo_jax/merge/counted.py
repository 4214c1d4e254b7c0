"""What a count of votes has so far, and the file from which one that was stopped goes on."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from safetydpo_jax.errors import adding
from safetydpo_jax.merge.moments import Moments
from safetydpo_jax.tensor_file import opened, write_tensors

_HEADER = "safetydpo_counted"
_PARTS = ("harmful", "harmless", "images")


@dataclasses.dataclass
class Counted:
    """Sums over the prompts that were drawn.

    Attributes:
      outputs: by layer, votes on its outputs: (halves x categories, bands, experts, out).
      ranks: by layer, votes on the experts' rank units.
      moments: by layer, second moments of its inputs, on the devices; none if not asked for.
      prompts: how many were drawn.
    """

    outputs: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    moments: dict[str, Moments]
    prompts: int = 0

    def save(self, path: Path, settings: str) -> None:
        """Writes a safetensors file, whole or not at all; votes as float32, as in the end.

        Args:
          path: the file.
          settings: a digest of all that the sums depend on.
        """
        tensors = {f"outputs.{layer}": counts for layer, counts in self.outputs.items()}
        tensors |= {f"ranks.{layer}": counts for layer, counts in self.ranks.items()}
        for layer, moments in self.moments.items():
            tensors |= {f"{part}.{layer}": x for part, x in zip(_PARTS, moments, strict=True)}
        said = {"settings": settings, "prompts": self.prompts}
        shapes = {name: x.shape for name, x in tensors.items()}
        values = ((name, jax.device_get(x)) for name, x in tensors.items())
        write_tensors(path, shapes, values, metadata={_HEADER: json.dumps(said)})

    def restored(self, path: Path, settings: str) -> "Counted":
        """What `save` wrote for these settings; else this, which has nothing yet.

        Raises:
          UserError: the file is damaged.
        """
        if not path.is_file():
            return self
        remedy = f"; or delete {path.name}, and all is counted anew"
        with adding(remedy), opened(path) as file:
            said = json.loads(file.metadata().get(_HEADER, "{}"))
            if said.get("settings") != settings:
                return self
            tables = file.tables()
        moments = {
            layer: tuple(
                jax.device_put(tables[part][layer], x.sharding)
                for part, x in zip(_PARTS, before, strict=True)
            )
            for layer, before in self.moments.items()
        }
        return Counted(
            {layer: x.astype(np.int64) for layer, x in tables["outputs"].items()},
            {layer: x.astype(np.int64) for layer, x in tables["ranks"].items()},
            moments,
            said["prompts"],
        )
