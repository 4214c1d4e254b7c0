"""Slices of TPU chips, by the names that Google's interfaces have for them.

Sources: https://cloud.google.com/tpu/docs/supported-tpu-configurations and
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
"""

import dataclasses
import math
import re
from typing import NamedTuple

from safetydpo_jax.errors import UserError


class _Kind(NamedTuple):
    """A version's names.

    Attributes:
      accelerator: how accelerator types begin.
      counts: what the number in them is of, for each chip.
      runtime: the software of its virtual machines.
      node: the label of its nodes in GKE.
      host: the most chips that a host of several has, and all that a host alone may have.
    """

    accelerator: str
    counts: int
    runtime: str
    node: str
    host: tuple[int, int]


KINDS = {
    "v5e": _Kind("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", (4, 8)),
    "v5p": _Kind("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", (4, 4)),  # its number is of cores
    "v6e": _Kind("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", (4, 8)),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice.

    Attributes:
      kind: "v5e", "v5p" or "v6e".
      shape: how many chips lie along each axis.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """How many machines they are on."""
        several, alone = KINDS[self.kind].host
        return 1 if self.chips <= alone else self.chips // several

    @property
    def accelerator_type(self) -> str:
        """Its name for gcloud, such as v5litepod-16."""
        kind = KINDS[self.kind]
        return f"{kind.accelerator}-{kind.counts * self.chips}"

    @property
    def runtime(self) -> str:
        """The software version of its virtual machines, for gcloud."""
        return KINDS[self.kind].runtime

    @property
    def node_labels(self) -> dict[str, str]:
        """By which GKE finds its nodes."""
        return {
            "cloud.google.com/gke-tpu-accelerator": KINDS[self.kind].node,
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, self.shape)),
        }


def parse_slice(topology: str) -> Slice:
    """A slice of its name, as `launch/plan.py` takes it: "v5e:4x4", "v5p:4x4x8".

    Raises:
      UserError: it is no such name.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    if not match or match[1] not in KINDS or len(match[2].split("x")) != _axes(match[1]):
        raise UserError(
            f"--topology is {topology!r}: give one of {', '.join(KINDS)} with its chips along each "
            "axis, as v5e:4x4 or v5p:4x4x8"
        )
    found = Slice(match[1], tuple(map(int, match[2].split("x"))))
    several, alone = KINDS[found.kind].host
    if not found.chips or (found.chips > alone and found.chips % several):
        raise UserError(f"--topology is {topology!r}: {found.chips} chips fill no hosts")
    return found


def _axes(kind: str) -> int:
    return 3 if kind == "v5p" else 2
