"""Who answers under which prompt: of a category's prompts its expert, of safe ones the base."""

import time
from collections.abc import Callable, Sequence
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
        self.about = {
            "experts": experts.hashes,
            "weights": experts.weights,
            "prompts": storage.digest([*self.prompts, *self.own.tolist()]),
            "base": storage.hash_parts(pipeline.sources, ("unet", "scheduler")),
            "computed_in": str(jnp.dtype(pipeline.unet.dtype)),
        }
        self._pipeline, self._experts = pipeline, experts
        self._split = sharding.batch_sharding(mesh)

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
        """Each prompt's latents as its teacher draws them, kept in a file.

        Args:
          folder: of that file, whose name goes by all that the pictures depend on.
          seed: of the initial noise.
          batch_size: pictures at a time, over all devices.
          sampler: as in `samplers.make_sampler`, with
          num_steps: its steps, and
          guidance_scale: as for a picture.
          matmul_precision: of all products.
          progress: takes a line after every batch: done, time left.
        """
        key = {
            **self.about,
            "seed": seed,
            "sampler": sampler,
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "matmul_precision": matmul_precision,
        }
        file = folder / f"pictures_{storage.digest(key)[:16]}.safetensors"
        if file.is_file():
            with opened(file) as kept:
                return kept.read("latents")
        sample = make_sampler(
            self._pipeline.unet,
            self._pipeline.schedule,
            sampler=sampler,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        )
        (params, stacked), count, found = self.weights, len(self.own), []
        negative = jax.device_put(self._pipeline.encode_negative([""] * batch_size), self._split)
        seeds = np.random.SeedSequence(seed).generate_state(count)
        began = time.monotonic()
        for start in range(0, count, batch_size):
            # A short last batch is filled up, so that its shape needs no compilation of its own.
            index = np.minimum(np.arange(start, start + batch_size), count - 1)
            noise = initial_latents(seeds[index], self._pipeline.latent_shape)
            # Guidance doubles the rows, the empty prompt's first.
            lora = self._experts.routed(
                stacked, np.tile(self.own[index], 2 if guidance_scale > 1 else 1)
            )
            rows = jax.tree.map(lambda x, i=index: x[i], self.told)
            noise, rows = jax.device_put((noise, rows), self._split)
            with jax.default_matmul_precision(matmul_precision):
                found.append(np.asarray(sample(params, lora, noise, rows, negative)))
            done = min(start + batch_size, count)
            left = (time.monotonic() - began) / done * (count - done)
            progress(f"distillation: {done}/{count} pictures drawn, {left:.0f} s left")
        latents = np.concatenate(found)[:count]
        write_tensors(file, {"latents": latents.shape}, [("latents", latents)])
        return latents
