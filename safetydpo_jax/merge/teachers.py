"""Who answers under which prompt: of a category's prompts its expert, of safe ones the base."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safetydpo_jax import sharding, storage
from safetydpo_jax.diffusion.samplers import initial_latents, make_sampler
from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.experts import Experts
from safetydpo_jax.merge.moments import SAFE, check_categories
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.pace import Pace
from safetydpo_jax.tensor_file import opened, write_tensors


class Teachers:
    """The experts and the base, with prompts.

    Args:
      pipeline: the base, a `models.pipeline.Pipeline`.
      experts: of that base, each as strong as its weight says.
      prompts: texts, of every expert's category and safe ones.
      categories: of each prompt, an expert's name or `SAFE`; prompts of others are left out.
      mesh: whose devices hold the weights and share the rows.

    Attributes:
      prompts: the n that are left.
      own: of each, (n,), its expert, -1 for a safe one.
      told: what the UNet is told of each, n rows.
      null: and of the empty prompt, without rows.
      weights: of the base and of all experts, stacked, on the devices.
      about: what their answers depend on; JSON.

    Raises:
      UserError: missing prompts.
    """

    def __init__(
        self,
        pipeline: Any,
        experts: Experts,
        prompts: Sequence[str],
        categories: Sequence[str],
        mesh: jax.sharding.Mesh,
    ):
        if len(prompts) != len(categories):
            raise UserError(f"{len(prompts)} prompts with {len(categories)} categories")
        check_categories(categories, experts)
        taught = [i for i, x in enumerate(categories) if x == SAFE or x in experts.names]
        self.prompts = [prompts[i] for i in taught]
        self.own = experts.of_categories([categories[i] for i in taught])
        self.told: Conditioning = pipeline.encode_prompts(self.prompts)
        self.null: Conditioning = jax.tree.map(lambda x: x[0], pipeline.encode_negative([""]))
        self.weights = jax.device_put(
            (pipeline.unet_params, experts.stacked()), sharding.replicated(mesh)
        )
        sources = pipeline.sources
        self.about = {
            "experts": experts.hashes,
            "weights": experts.weights,
            "prompts": storage.digest([*self.prompts, *self.own.tolist()]),
            "base": storage.hash_parts(sources, [name for name in sources if name != "vae"]),
            "computed_in": str(jnp.dtype(pipeline.unet.dtype)),
        }
        self._pipeline, self._experts = pipeline, experts
        self._mesh, self._split = mesh, sharding.batch_sharding(mesh)

    def answer(
        self,
        weights: Any,
        own: Int[Array, "b"],
        x: Float[Array, "b h w c"],
        t: Int[Array, "b"],
        told: Conditioning,
    ) -> Float[Array, "b h w c"]:
        """Of each row its teacher's prediction; `weights` are given so that none is compiled in."""
        params, stacked = weights
        lora = self._experts.routed(stacked, own)
        return self._pipeline.unet.apply({"params": params, "lora": lora}, x, t, *told)

    def pictures(
        self,
        folder: Path,
        *,
        seed: int,
        batch_size: int,
        sampler: str,
        num_steps: int,
        guidance_scale: float,
        matmul_precision: str,
        progress: Callable[[str], None],
    ) -> Float[np.ndarray, "n h w c"]:
        """Each prompt's latents as its teacher draws them, kept in a file for each batch.

        Args:
          folder: of the files, whose names go by all that the pictures depend on.
          seed: of the initial noise.
          batch_size: pictures at a time, over all devices.
          sampler: as in `samplers.make_sampler`, with
          num_steps: its steps, and
          guidance_scale: as for a picture.
          matmul_precision: of all products.
          progress: takes a line after every batch: done, time left.
        """
        options = {"sampler": sampler, "num_steps": num_steps, "guidance_scale": guidance_scale}
        key = {**self.about, "seed": seed, **options, "matmul_precision": matmul_precision}
        name = f"pictures_{storage.digest(key | {'batch': batch_size})[:16]}"
        count = len(self.own)
        files = {i: folder / f"{name}_{i:06d}.safetensors" for i in range(0, count, batch_size)}
        if missing := [start for start, file in files.items() if not file.is_file()]:
            draw = self._drawer(seed, batch_size, options)
            pace = Pace(len(missing))
            for done, start in enumerate(missing, 1):
                with jax.default_matmul_precision(matmul_precision):
                    latents = draw(start)
                write_tensors(files[start], {"latents": latents.shape}, [("latents", latents)])
                drawn = min(start + batch_size, count)
                progress(
                    f"distillation: {drawn}/{count} pictures drawn, {pace.left(done):.0f} s left"
                )
        found = []
        for file in files.values():
            with opened(file) as kept:
                found.append(kept.read("latents"))
        return np.concatenate(found)[:count]

    def _drawer(
        self, seed: int, batch_size: int, options: Mapping[str, Any]
    ) -> Callable[[int], np.ndarray]:
        """Draws the batch that begins with a prompt."""
        sample = make_sampler(self._pipeline.unet, self._pipeline.schedule, **options)
        (params, stacked), count = self.weights, len(self.own)
        negative = jax.device_put(self._pipeline.encode_negative([""] * batch_size), self._split)
        seeds = np.random.SeedSequence(seed).generate_state(count)

        def draw(start: int) -> np.ndarray:
            # A short last batch is filled up, so that its shape needs no compilation of its own.
            index = np.minimum(np.arange(start, start + batch_size), count - 1)
            noise = initial_latents(seeds[index], self._pipeline.latent_shape)
            # Guidance doubles the rows, the empty prompt's first.
            twice = 2 if options["guidance_scale"] > 1 else 1
            lora = self._experts.routed(stacked, np.tile(self.own[index], twice))
            rows = jax.tree.map(lambda x: x[index], self.told)
            noise, rows = jax.device_put((noise, rows), self._split)
            # The mesh in context is the one over which attention spreads a kernel of its own.
            with jax.set_mesh(self._mesh):
                return np.asarray(sample(params, lora, noise, rows, negative))

        return draw
