"""The programs of a run, lowered for devices that are not at hand, from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from ml_collections import ConfigDict

from safetydpo_jax import lora, sharding
from safetydpo_jax.data import check_resolution
from safetydpo_jax.models.checkpoint import open_checkpoint
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.models.pipeline import Pipeline
from safetydpo_jax.models.target import compiling_for
from safetydpo_jax.train.flops import step_flops
from safetydpo_jax.train.state import TrainState, make_optimizer
from safetydpo_jax.train.step import Numbers, make_train_step


class Planned:
    """A config's model on a slice, without weights.

    Args:
      config: from `settings.resolve`.
      model: a checkpoint in the diffusers layout, or "emoji"; its weights are not asked for.
      mesh: the config's, over the slice's devices; an abstract one is enough to count.
      experts: how many are trained at once, if several; see `step.make_train_step`.

    Attributes:
      config, mesh, experts: as given.
      latents: (h, w, c) of a row.
      pipeline: with shapes in the place of parameters, in the types that training has them in.
    """

    def __init__(
        self, config: ConfigDict, model: str, mesh: Mesh | AbstractMesh, experts: int | None = None
    ):
        self.config, self.experts = config, experts
        self.mesh: Any = mesh
        self._whole, self._split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        found = open_checkpoint(model, configs=config.model_config)
        networks, types = found.in_type(jnp.dtype(config.dtype))
        networks["unet"] = networks["unet"].clone(remat=config.remat)
        params = {
            name: jax.tree.map(
                lambda x, dtype=types[name]: jax.ShapeDtypeStruct(x.shape, dtype), shapes
            )
            for name, shapes in found.shapes.items()
        }
        self.pipeline = Pipeline(networks, params, [], found.schedule, found.configs)
        check_resolution(config, self.pipeline.vae)
        h, w, c = self.pipeline.latent_shape
        if pixels := config.cache.resolution:
            h = w = pixels // self.pipeline.vae.config.downscale
        self.latents = h, w, c

    def flops(self) -> float:
        """Model FLOPs of a step, on all devices together; see `flops.step_flops`."""
        pipeline = self.pipeline
        null = self._conditioning(None, self._whole)
        params = pipeline.unet_params
        one = step_flops(pipeline.unet, params, self.latents, null, self.config)
        return one * (self.experts or 1)

    def arguments(self) -> tuple[Any, Any, dict[str, Any], Any]:
        """Shapes of what a step is given, laid out: state, parameters, batch, null.

        Raises:
          UserError: a rule of `config.mesh` or a LoRA that does not fit the model.
        """
        config, pipeline = self.config, self.pipeline
        shardings = sharding.param_shardings(self.mesh, pipeline.unet_params, config.mesh.rules)
        params = jax.tree.map(laid_out, pipeline.unet_params, shardings)

        count = self.experts or 1

        def first_state() -> TrainState:
            adapters, optimizer = self._first_adapters(), make_optimizer(config)
            if several := self.experts is not None:
                adapters = jax.tree.map(lambda x: jnp.stack([x] * count), adapters)
            return TrainState.create(adapters, optimizer, several=several)

        state = jax.tree.map(lambda x: laid_out(x, self._whole), jax.eval_shape(first_state))
        return state, params, self._batch(), self._conditioning(None, self._whole)

    def step(self) -> Any:
        """The training step, lowered; see `step.make_train_step`.

        Raises:
          UserError: as it does, or as `arguments`.
        """
        config, pipeline = self.config, self.pipeline
        arguments = self.arguments()
        step = make_train_step(pipeline.unet, pipeline.schedule, config, self.mesh, self.experts)
        number = laid_out(np.float32(0), self._whole)
        numbers = Numbers(*[number] * len(Numbers._fields))
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(config.matmul_precision):
            return lowered(step, *arguments, numbers)

    def told(self) -> Conditioning:
        """The shapes of what one prompt tells the UNet, (1, ...), in the text encoders' types."""
        pipeline = self.pipeline
        inputs = token_shapes(pipeline, 1)
        return jax.eval_shape(pipeline.encode_tokens, pipeline.text_params, inputs)

    def _first_adapters(self) -> lora.Adapters:
        """As `expert.Expert.first_adapters` has them, for their shapes."""
        config, params = self.config.lora, self.pipeline.unet_params
        if config.init:
            return lora.load_lora(config.init, params)[0]
        key = jax.random.key(0, impl="threefry2x32")
        return lora.init_adapters(key, params, rank=config.rank, targets=config.targets)

    def _batch(self) -> dict[str, Any]:
        """The shapes of what `data.batches` yields."""
        config = self.config
        rows = config.batch_size * config.accumulation

        def moments(count: int) -> dict[str, Any]:
            return {name: self._array((count, *latents)) for name in ("mean", "logvar")}

        def numbers(count: int) -> dict[str, Any]:
            return {name: self._array((count,), np.uint32) for name in ("row_id", "draw")}

        latents = self.latents
        batch = numbers(rows) | {
            "winner": moments(rows),
            "loser": moments(rows),
            "conditioning": self._conditioning(rows, self._split),
            "winner_conditioning": self._conditioning(rows, self._split),
        }
        preserved = config.preserve_batch_size * config.accumulation
        if preserved:
            told = self._conditioning(preserved, self._split)
            harm = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), told)
            harm = jax.tree.map(lambda x: laid_out(x, self._split), harm)
            batch["preserve"] = (
                moments(preserved) | numbers(preserved) | {"conditioning": told, "harm": harm}
            )
        if config.reference.draws:
            known = {"errors": self._array((rows, 2), np.float32)}
            if config.loss.winner_anchor > 0:
                known["wanted"] = self._array((rows, 2, *latents), np.float32)
            if config.loss.preservation > 0:
                known["preserved"] = self._array((preserved, *latents), np.float32)
            batch["reference"] = known
        return batch

    def _array(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Rows of a batch, in the cache's type or another; of several experts side by side."""
        dtype, (rows, *row) = dtype or jnp.dtype(self.config.cache.dtype), shape
        return jax.ShapeDtypeStruct((*self._lead(rows), *row), dtype, sharding=self._split)

    def _lead(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.experts is None else (rows, self.experts)

    def _conditioning(self, rows: int | None, layout: NamedSharding) -> Any:
        """What so many prompts tell the UNet, as the cache holds it; None: one, without an axis."""
        lead = () if rows is None else self._lead(rows)
        dtype = jnp.dtype(self.config.cache.dtype)
        told = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), dtype, sharding=layout),
            self.told(),
        )
        if told.time_ids is not None:  # pixels, whatever the cache's type
            sizes = jax.ShapeDtypeStruct((*lead, 6), np.float32, sharding=layout)
            told = told._replace(time_ids=sizes)
        return told


def token_shapes(pipeline: Pipeline, rows: int) -> tuple[list[Any], Any]:
    """Of the inputs of `Pipeline.encode_tokens`: ids of each text encoder, sizes in pixels."""
    encoders = [pipeline.networks[name] for name in pipeline.text_params]
    ids = [
        jax.ShapeDtypeStruct((rows, encoder.config.max_position_embeddings), np.int32)
        for encoder in encoders
    ]
    return ids, jax.ShapeDtypeStruct((rows, 6), np.float32)


def laid_out(x: Any, layout: NamedSharding) -> Any:
    """A shape with a layout."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)


def lowered(fn: Any, *arguments: Any) -> Any:
    """A jitted function's program for TPUs, of arguments that are shapes laid out on them."""
    with compiling_for("tpu"):
        return fn.trace(*arguments).lower(lowering_platforms=("tpu",))
