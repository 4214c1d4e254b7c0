"""What runs before training: drawing the pairs, and the pass that encodes them for the cache.

Every chip runs the same programs on rows of its own and sends nothing, whatever the slice.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from safetydpo_jax import sharding
from safetydpo_jax.data.encode import ENCODE_BATCH
from safetydpo_jax.diffusion import make_sampler
from safetydpo_jax.models.pipeline import PROMPTS_AT_ONCE, pictures_at_once
from safetydpo_jax.plan.chips import Chip
from safetydpo_jax.plan.estimate import compiled_for
from safetydpo_jax.plan.programs import Planned, laid_out, lowered, token_shapes

# Which programs a picture goes through.
PASSES = {"drawing": ("text encoder", "sampler", "decoder"), "cache": ("text encoder", "encoder")}


def of_passes(
    planned: Planned, topology: str, chip: Chip, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compiles what draws pictures and what encodes them, and reckons their rates.

    Args:
      planned: the run.
      topology: the slice it is planned for.
      chip: of that slice.
      progress: takes lines of text.

    Returns:
      Fit for JSON. `programs`: by name what `estimate.compiled_for` says of each, and `rows` that a
      chip takes at a time, `bytes_beside` (parameters of other networks, in memory meanwhile),
      `fits`, and `estimated_seconds` that these rows take. By name of `PASSES`, `fits` and, if so,
      `pictures_per_second` of one chip, else `remedies`. Rows that are no picture's, as batches are
      filled up, are not counted as such.
    """
    passes = Passes(planned)
    programs = {}
    for name, make in (
        ("text encoder", passes.text_encoder),
        ("sampler", passes.sampler),
        ("decoder", passes.decoder),
        ("encoder", passes.encoder),
    ):
        progress(f"lowering the {name}")
        program = make()
        found = compiled_for(program.lowered, topology, chip, progress)
        sizes = found["bytes_per_chip"]
        programs[name] = found | {
            "rows": program.rows,
            "bytes_beside": program.beside,
            "fits": "cycles" in found and sizes["all"] + program.beside <= sizes["memory"],
        }
        if "cycles" in found:
            programs[name]["estimated_seconds"] = sum(found["cycles"].values()) / chip.hertz
    plan: dict[str, Any] = {"programs": programs}
    for name, parts in PASSES.items():
        plan[name] = {"fits": all(programs[part]["fits"] for part in parts)}
        if plan[name]["fits"]:
            batch = passes.batch(name)  # of pictures on a chip, before the next ones are taken
            seconds = {
                part: -(-batch // programs[part]["rows"]) * programs[part]["estimated_seconds"]
                for part in parts
            }
            if "encoder" in seconds and planned.config.cache.flip:
                seconds["encoder"] *= 2
            plan[name]["pictures_per_second"] = batch / sum(seconds.values())
        else:
            large = [part for part in parts if not programs[part]["fits"]]
            plan[name]["remedies"] = _remedies(planned.config, large)
    return plan


def _remedies(config: ConfigDict, large: Sequence[str]) -> list[str]:
    """What to change, programs being too large."""
    found = ["--config.dtype=bfloat16"] if config.dtype == "float32" else []
    if "sampler" in large and config.drawing.batch_size > 1:
        found.append(f"--config.drawing.batch_size={config.drawing.batch_size // 2}")
    return found or ["a slice whose chips have more memory"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of all chips.

    Attributes:
      lowered: ready to be compiled.
      rows: that one chip takes.
      beside: bytes of the parameters that are in a chip's memory and none of its arguments.
    """

    lowered: Any
    rows: int
    beside: int


class Passes:
    """The programs of a run that come before its step, lowered."""

    def __init__(self, planned: Planned):
        self._config = planned.config
        mesh = sharding.make_mesh(devices=planned.mesh.devices.flatten().tolist())
        self._pipeline = dataclasses.replace(planned.pipeline, mesh=mesh)
        self._told = planned.told()
        # Of a host's chips, which share its batches.
        first = mesh.devices.flat[0].process_index
        self._chips = sum(device.process_index == first for device in mesh.devices.flat)
        shapes = planned.pipeline.unet_params
        layouts = sharding.param_shardings(planned.mesh, shapes, planned.config.mesh.rules)
        self._unet_bytes = sum(
            math.prod(layout.shard_shape(x.shape)) * x.dtype.itemsize
            for x, layout in zip(jax.tree.leaves(shapes), jax.tree.leaves(layouts), strict=True)
        )
        self._everywhere, self._split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def batch(self, name: str) -> float:
        """Pictures that a chip draws or encodes at a time, of a pass of this name."""
        if name == "drawing":
            return self._config.drawing.batch_size
        return ENCODE_BATCH / self._chips

    def text_encoder(self) -> Program:
        """The text encoders, SDXL's both."""
        pipeline = self._pipeline
        inputs = token_shapes(pipeline, PROMPTS_AT_ONCE * pipeline.num_devices)
        inputs = jax.tree.map(lambda x: laid_out(x, self._split), inputs)
        names = tuple(pipeline.text_params)
        return self._program(
            pipeline.encode_tokens, names, pipeline.text_params, PROMPTS_AT_ONCE, inputs
        )

    def sampler(self) -> Program:
        """All steps of a batch, guided."""
        pipeline, config = self._pipeline, self._config.drawing
        sampler = make_sampler(
            pipeline.unet,
            pipeline.schedule,
            sampler=config.sampler,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            mesh=pipeline.mesh,
        )

        def sample(params: Any, noise: Any, text: Any, negative: Any) -> Any:
            return sampler(params, None, noise, text, negative)

        rows = config.batch_size
        noise = self._rows(rows, pipeline.latent_shape)
        text = jax.tree.map(lambda x: self._rows(rows, x.shape[1:], x.dtype), self._told)
        with jax.default_matmul_precision(config.matmul_precision):
            inputs = (noise, text, text)
            return self._program(jax.jit(sample), ("unet",), pipeline.unet_params, rows, *inputs)

    def decoder(self) -> Program:
        """The autoencoder's, of drawn latents."""
        pipeline, config = self._pipeline, self._config.drawing
        rows = min(pictures_at_once(pipeline.resolution**2), config.batch_size * self._chips)
        latents = self._rows(rows, pipeline.latent_shape)
        with jax.default_matmul_precision(config.matmul_precision):
            return self._program(pipeline.decode, ("vae",), pipeline.vae_params, rows, latents)

    def encoder(self) -> Program:
        """The autoencoder's, of pictures to train on."""
        pipeline = self._pipeline
        side = self._config.cache.resolution or pipeline.resolution
        rows = pictures_at_once(side**2)
        pictures = self._rows(rows, (side, side, 3), np.uint8)
        return self._program(pipeline.encode, ("vae",), pipeline.vae_params, rows, pictures)

    def _program(
        self, fn: Any, names: tuple[str, ...], params: Any, rows: int, *inputs: Any
    ) -> Program:
        """A function of the parameters of some networks and of inputs."""
        params = jax.tree.map(lambda x: laid_out(x, self._everywhere), params)
        others = [
            tree for name, tree in self._pipeline.params.items() if name not in (*names, "unet")
        ]
        beside = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(others))
        beside += 0 if "unet" in names else self._unet_bytes  # as the mesh splits it
        return Program(lowered(fn, params, *inputs), rows, beside)

    def _rows(self, rows: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        """Of each chip so many."""
        shape = (rows * self._pipeline.num_devices, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._split)
