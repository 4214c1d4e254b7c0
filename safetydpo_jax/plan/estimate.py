"""What a program takes of a slice's chips: memory, time, and what they send each other."""

import gzip
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from safetydpo_jax import storage
from safetydpo_jax.plan.chips import Chip
from safetydpo_jax.plan.collectives import share
from safetydpo_jax.plan.cost import cost_of
from safetydpo_jax.remote import cache_home

# What the compiler says of too large a program, in either of its wordings.
_USED = re.compile(r"(?:Used |required for HLO \w+ \()([\d.]+)([KMGT])\b")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled_for(
    lowered: Any, topology: str, chip: Chip, progress: Callable[[str], None], data: int = 1
) -> dict[str, Any]:
    """Compiles a program and reads what its compiler says of it.

    Args:
      lowered: the program, as of `programs`.
      topology: that it is lowered for.
      chip: of that slice.
      progress: takes lines of text.
      data: shards of the mesh's "data" axis.

    Returns:
      Fit for JSON: `compile_seconds`, `bytes_per_chip` (arguments, temporaries, results, program,
      all and memory), and unless it does not fit `cycles` by kind of work, `collectives` (a list of
      kind, chips of a group, over_data, count, and bytes of the whole arrays; see
      `collectives.Group`), and what `cost.Cost` says of `unknown_kernels`,
      `loops_of_unknown_length` and `branches`. All is the compiler's own but the cycles of
      "attention kernels" (`cost.splash`).

    Raises:
      UserError: what is compiled cannot be kept.
    """
    compiled = _compiled(lowered, topology, progress)
    sizes, text = compiled["sizes"], compiled["text"]
    found = {
        "compile_seconds": compiled["seconds"],
        "bytes_per_chip": {**sizes, "memory": chip.memory},
    }
    if text is None:
        return found
    cost = cost_of(text, chip, data)
    return found | {
        "cycles": dict(sorted(cost.cycles.items())),
        "collectives": [
            {**group._asdict(), "count": n, "bytes": cost.sizes[group]}
            for group, n in sorted(cost.counts.items())
        ],
        "unknown_kernels": dict(cost.unknown_kernels),
        "loops_of_unknown_length": cost.unknown_loops,
        "branches": cost.branches,
    }


def _compiled(lowered: Any, topology: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """The compiler's own words, kept as they are: what is read of them may change.

    Returns:
      `seconds` that it took, `sizes` in bytes, and `text`, which is None if it does not fit.
    """
    key = storage.digest({"text": lowered.as_text(), "topology": topology, "versions": _versions()})
    file = cache_home() / "plans" / f"{key[:16]}.json.gz"
    if file.is_file():
        progress(f"compiled before: {file}")
        return json.loads(gzip.decompress(file.read_bytes()))
    with storage.explained_writes(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    storage.check_writable(file)  # now, not after minutes
    progress(f"compiling for {topology}, which takes minutes for Stable Diffusion on few cores")
    began = time.monotonic()
    text = None
    try:
        compiled = lowered.compile()
        text, sizes = compiled.as_text(), _sizes(compiled.memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        # A kernel may exhaust another memory: that is an error, and no answer.
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        used = _USED.search(str(error))
        sizes = {"all": round(float(used[1]) * _UNITS[used[2]]) if used else None}
    seconds = round(time.monotonic() - began, 1)
    progress(f"compiled in {seconds:.0f} s")
    found = {"seconds": seconds, "sizes": sizes, "text": text}
    with storage.explained_writes(file):
        storage.write_file(file, gzip.compress(json.dumps(found).encode()))
    return found


def _versions() -> str:
    try:
        compiler = version("libtpu")
    except PackageNotFoundError:  # it may be there without a package
        compiler = "?"
    return f"jax {jax.__version__}, libtpu {compiler}"


def _sizes(memory: Any) -> dict[str, int]:
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return sizes | {"all": sum(sizes.values())}


def estimate(
    found: Mapping[str, Any], chip: Chip, mesh: Mapping[str, int], pairs: int, flops: float
) -> dict[str, Any]:
    """A training step's time, from what was compiled.

    Args:
      found: of the step, from `compiled_for`.
      chip: of the slice.
      mesh: how long its axes are, "data" among them.
      pairs: in a step, on all chips together.
      flops: model FLOPs of a step, on all chips together.

    Returns:
      `found`, and `fits`, `flops_per_chip`; if it fits the estimates `cycles_per_pair`,
      `estimated_step_seconds` (cycles over the clock, and what is sent over the links, as if
      neither hid the other), `collective_share` of it, `estimated_mfu` (model FLOPs over that time
      and the chip's peak), `pairs_per_second`, and `weak_scaling`: the step's seconds on other
      numbers of chips, each with as many pairs, if the "data" axis grows and the others stay. Where
      that axis has one shard, what it would send is not compiled, and only this slice is there.
    """
    chips, data = math.prod(mesh.values()), mesh["data"]
    sizes = found["bytes_per_chip"]
    fits = "cycles" in found and sizes["all"] <= sizes["memory"]
    result = {"fits": fits, "flops_per_chip": flops / chips, **found}
    if "cycles" not in found:
        return result
    computing = sum(found["cycles"].values()) / chip.hertz

    def step_seconds(n: int) -> float:
        sending = sending_seconds(found["collectives"], chip, n / chips) if n > 1 else 0
        return computing + sending

    seconds = step_seconds(chips)
    others = [n for n in (1, 4, 16, 64, 256) if n % (chips // data) == 0]
    return result | {
        "cycles_per_pair": round(sum(found["cycles"].values()) * chips / pairs),
        "estimated_step_seconds": seconds,
        "collective_share": 1 - computing / seconds,
        "estimated_mfu": flops / chips / seconds / chip.flops,
        "pairs_per_second": pairs / seconds,
        "weak_scaling": {n: step_seconds(n) for n in (others if data > 1 else [chips])},
    }


def sending_seconds(
    collectives: Sequence[Mapping[str, Any]], chip: Chip, growth: float = 1
) -> float:
    """How long a chip's links are busy.

    Args:
      collectives: as `compiled_for` has them.
      chip: whose links.
      growth: of the slice, and with it of the groups that are over the whole "data" axis.
    """
    sent = 0.0
    for found in collectives:
        chips = round(found["chips"] * (growth if found["over_data"] else 1))
        sent += share(found["kind"], chips) * found["bytes"]
    return sent / chip.links
