"""GPUs: no compiler for them is at hand, so their plans are counted, and one figure is assumed."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from safetydpo_jax.errors import GPU_MEMORY_SHARE, UserError

# The share of the peak that a step's model FLOPs reach, unless --mfu says what was measured.
ASSUMED_MFU = 0.25


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU, with its maker's figures.

    Of https://www.nvidia.com/en-us/data-center, A100 and Hopper as SXM; the RTX 4090's are of its
    architecture's whitepaper.

    Attributes:
      name: as a topology's name begins.
      flops: of dense products in a second, at most, by the type of what is multiplied.
      memory: bytes.
    """

    name: str
    flops: Mapping[str, float]
    memory: int


_AMPERE = {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12}
_HOPPER = {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx4090", {"bfloat16": 165e12, "tf32": 82.6e12, "float32": 82.6e12}, 24 * 2**30),
        Gpu("l40s", {"bfloat16": 362e12, "tf32": 183e12, "float32": 91.6e12}, 48 * 2**30),
        Gpu("a100-40", _AMPERE, 40 * 2**30),
        Gpu("a100", _AMPERE, 80 * 2**30),
        Gpu("h100", _HOPPER, 80 * 2**30),
        Gpu("h200", _HOPPER, 140 * 2**30),
    )
}


def gpus_of(topology: str) -> tuple[Gpu, int] | None:
    """A kind of GPU and how many there are, of "h100:8", or of "h100:2x8", two machines of eight.

    Returns:
      None if it names no GPU.

    Raises:
      UserError: it names one, but not how many.
    """
    name, _, count = topology.partition(":")
    if name not in GPUS:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", count):
        raise UserError(f"--topology is {topology!r}: give how many GPUs, as {name}:8")
    return GPUS[name], math.prod(map(int, count.split("x")))


def products_of(config: ConfigDict) -> str:
    """In what type a step's products are, on a GPU."""
    if config.dtype == "bfloat16":
        return "bfloat16"
    return "float32" if config.matmul_precision == "float32" else "tf32"


def estimate_on_gpus(
    gpu: Gpu, count: int, pairs: int, flops: float, products: str, arguments: Any, mfu: float
) -> dict[str, Any]:
    """A training step's time, by counting alone.

    Args:
      gpu: of which
      count: there are so many.
      pairs: in a step, on all of them together.
      flops: model FLOPs of a step, on all of them together.
      products: of `products_of`, which decides the peak.
      arguments: shapes of what the step is given, laid out.
      mfu: the share of the peak that is assumed.

    Returns:
      As of `estimate.estimate`: `fits`, which is None unless the arguments alone are too large,
      `flops_per_chip`, `bytes_per_chip` (arguments, and memory that a run takes), `products`,
      `assumed_mfu`, `estimated_step_seconds`, `pairs_per_second`.
    """
    size, memory = bytes_on_each(arguments), int(GPU_MEMORY_SHARE * gpu.memory)
    seconds = flops / count / (mfu * gpu.flops[products])
    return {
        "fits": None if size < memory else False,
        "flops_per_chip": flops / count,
        "bytes_per_chip": {"arguments": size, "memory": memory},
        "products": products,
        "assumed_mfu": mfu,
        "estimated_step_seconds": seconds,
        "pairs_per_second": pairs / seconds,
    }


def bytes_on_each(tree: Any) -> int:
    """What each device holds of arrays that are laid out."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )
