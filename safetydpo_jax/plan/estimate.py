"""What a program takes of a slice's chips: memory, time, and what they send each other."""

import json
import re
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from safetydpo_jax import storage
from safetydpo_jax.data.remote import cache_home
from safetydpo_jax.plan.chips import Chip
from safetydpo_jax.plan.cost import cost_of

# What the compiler says of too large a program, in either of its wordings.
_USED = re.compile(r"(?:Used |required for HLO \w+ \()([\d.]+)([KMGT])\b")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled_for(
    lowered: Any, topology: str, chip: Chip, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compiles a program and keeps what its compiler says of it, for the next time.

    Args:
      lowered: the program, as of `programs`.
      topology: that it is lowered for.
      chip: of that slice.
      progress: takes lines of text.

    Returns:
      Fit for JSON: `bytes_per_chip` (arguments, temporaries, results, program, all and memory), and
      unless it does not fit `cycles` by kind of work, `collectives` (count and bytes that a chip
      gives, by kind) and `loops_of_unknown_length`. All is the compiler's own but the cycles of
      "attention kernels" (`cost.flash`).
    """
    key = storage.digest(
        {"text": lowered.as_text(), "topology": topology, "versions": _versions(), "format": 1}
    )
    file = cache_home() / "plans" / f"{key[:16]}.json"
    if file.is_file():
        progress(f"compiled before: {file}")
        return json.loads(file.read_text())
    with storage.explained_writes(file):
        file.parent.mkdir(parents=True, exist_ok=True)  # now: a disk may be read-only
    progress(f"compiling for {topology}, which takes minutes for Stable Diffusion on few cores")
    began = time.monotonic()
    found: dict[str, Any]
    try:
        found = _read(lowered.compile(), chip)
    except jax.errors.JaxRuntimeError as error:
        # A kernel may exhaust another memory: that is an error, and no answer.
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        used = _USED.search(str(error))
        needed = round(float(used[1]) * _UNITS[used[2]]) if used else None
        found = {"bytes_per_chip": {"all": needed, "memory": chip.memory}}
    seconds = round(time.monotonic() - began, 1)
    found["compile_seconds"] = seconds
    progress(f"compiled in {seconds:.0f} s")
    storage.write_file(file, (json.dumps(found, indent=1) + "\n").encode())
    return found


def _versions() -> str:
    try:
        compiler = version("libtpu")
    except PackageNotFoundError:  # it may be there without a package
        compiler = "?"
    return f"jax {jax.__version__}, libtpu {compiler}"


def _read(compiled: Any, chip: Chip) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    cost = cost_of(compiled.as_text(), chip)
    return {
        "bytes_per_chip": sizes | {"all": sum(sizes.values()), "memory": chip.memory},
        "cycles": {kind: round(n) for kind, n in sorted(cost.cycles.items())},
        "collectives": {
            kind: {"count": cost.counts[kind], "bytes": n} for kind, n in sorted(cost.sent.items())
        },
        "loops_of_unknown_length": cost.unknown_loops,
    }


def estimate(
    found: Mapping[str, Any], chip: Chip, chips: int, pairs: int, flops: float
) -> dict[str, Any]:
    """A training step's time, from what was compiled.

    Args:
      found: of the step, from `compiled_for`.
      chip: of the slice.
      chips: how many.
      pairs: in a step, on all chips together.
      flops: model FLOPs of a step, on all chips together.

    Returns:
      `found`, and `fits`, `flops_per_chip`; if it fits the estimates `cycles_per_pair`,
      `estimated_step_seconds` (cycles over the clock, and what is sent over the links, as if
      neither hid the other), `collective_share` of it, `estimated_mfu` (model FLOPs over that time
      and the chip's peak), `pairs_per_second`, and `weak_scaling`: the step's seconds on other
      numbers of chips, each with as many pairs, where an all-reduce sends 2 (n - 1) / n of its
      bytes round a ring.
    """
    sizes = found["bytes_per_chip"]
    fits = "cycles" in found and sizes["all"] <= sizes["memory"]
    result = {"fits": fits, "flops_per_chip": flops / chips, **found}
    if "cycles" not in found:
        return result
    computing = sum(found["cycles"].values()) / chip.hertz

    def step_seconds(n: int) -> float:
        return computing + sending_seconds(found["collectives"], chip, n)

    seconds = step_seconds(chips)
    return result | {
        "cycles_per_pair": round(sum(found["cycles"].values()) * chips / pairs),
        "estimated_step_seconds": seconds,
        "collective_share": 1 - computing / seconds,
        "estimated_mfu": flops / chips / seconds / chip.flops,
        "pairs_per_second": pairs / seconds,
        "weak_scaling": {n: step_seconds(n) for n in (1, 4, 16, 64, 256)},
    }


def sending_seconds(collectives: Mapping[str, Mapping[str, int]], chip: Chip, chips: int) -> float:
    """How long a chip's links are busy with its collectives."""
    if chips == 1:
        return 0.0
    ring = (chips - 1) / chips
    factors = {"all-reduce": 2 * ring, "all-gather": chips - 1}
    sent = (factors.get(kind, ring) * found["bytes"] for kind, found in collectives.items())
    return sum(sent) / chip.links
