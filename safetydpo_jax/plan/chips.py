"""TPUs that can be planned for, and their compiler without one of them."""

import dataclasses
import os
from typing import Any

import jax

from safetydpo_jax.errors import UserError, first_line
from safetydpo_jax.plan.gpus import GPUS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, with its maker's figures (https://cloud.google.com/tpu/docs, a page a version).

    Attributes:
      name: as a topology's name begins.
      flops: of bfloat16 products in a second, at most.
      memory: bytes of HBM that a program may have, as the compiler says when one is too large;
        it keeps the rest for itself.
      links: bytes in a second to other chips of its slice, over all its links and one way.
      hertz: cycles in a second, of what is said of the peak: 2 x hertz x the multipliers of all
        matrix units. It turns the compiler's cycles into seconds.
      side: multipliers along a side of a matrix unit.
      cores: TensorCores, among which the compiler divides a program; its cycles are the chip's.
    """

    name: str
    flops: float
    memory: int
    links: float
    hertz: float
    side: int
    cores: int

    @property
    def units(self) -> int:
        """How many matrix units' products it does in a cycle.

        A v6e has two units, but its peak at this clock takes four, and so do the cycles that the
        compiler writes: they are of half the units' clock.
        """
        return round(self.flops / (2 * self.hertz * self.side**2))


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, round(15.75 * 2**30), 200e9, 1.5e9, 128, 1),
        Chip("v5p", 459e12, round(95.74 * 2**30), 600e9, 1.75e9, 128, 2),
        Chip("v6e", 918e12, round(31.25 * 2**30), 400e9, 1.75e9, 256, 1),
    )
}
# libtpu asks for them when it is loaded: without the first it waits for a TPU host's metadata, and
# without the last it is there for one process at a time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def slice_of(topology: str) -> tuple[Chip, list[Any]]:
    """A slice's chips: their kind, and devices that programs can be compiled for.

    Args:
      topology: a kind and how many chips lie along each axis, as "v5e:4x4" or "v5p:4x4x8".

    Raises:
      UserError: there is no such slice, or no compiler for it.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"--topology is {topology!r}: give one of {', '.join(CHIPS)} with its chips along each "
            f"axis, as v5e:4x4 or v5p:4x4x8, or one of {', '.join(GPUS)}, as h100:8"
        )
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of no kind in particular
        reason = first_line(error)
        if "not installed" in reason:
            raise UserError(
                f"no TPU compiler here ({reason}): pip install 'safetydpo-jax[tpu]'; no TPU is "
                "needed"
            ) from None
        raise UserError(f"--topology {topology}: {reason}") from None
    return CHIPS[name], list(found.devices)


def use_cpu() -> None:
    """Keeps JAX from looking for a TPU here, once libtpu is installed; before all else."""
    jax.config.update("jax_platforms", "cpu")
