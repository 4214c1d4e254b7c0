"""Statistics made: one pass over the prompts for all experts, along a drawing of each prompt.

The drawing is the base model's own, or that of the expert that the prompt's category has. Either
way a layer's input is computed once for all experts, whose factors are stacked on an axis of their
own.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safetydpo_jax import sharding, storage
from safetydpo_jax.diffusion.samplers import SAMPLERS, advance, initial_latents
from safetydpo_jax.errors import UserError
from safetydpo_jax.merge import moments as moments_of
from safetydpo_jax.merge.counted import Counted
from safetydpo_jax.merge.experts import Experts
from safetydpo_jax.merge.moments import SAFE
from safetydpo_jax.merge.statistics import Statistics
from safetydpo_jax.models.layers import Conv
from safetydpo_jax.pace import Pace
from safetydpo_jax.train.workdir import Stop, stop_signal

TRAJECTORIES = ("base", "experts")
KEEP_SECONDS = 300  # between two writings of what was counted
BANDS = 4  # of timesteps, from noisy to clean, equally many steps each


def count_votes(
    pipeline: Any,
    experts: Experts,
    prompts: Sequence[str],
    categories: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 8,
    sampler: str = "ddim",
    num_steps: int = 20,
    guidance_scale: float = 7.5,
    inputs: bool = False,
    trajectory: str = "base",
    kept: Path | None = None,
    progress: Callable[[str], None] = print,
) -> Statistics:
    """Draws the prompts and counts, at every step, which expert would change most.

    Args:
      pipeline: the base, a `models.pipeline.Pipeline`.
      experts: of that base.
      prompts: n texts, of all categories.
      categories: of each prompt; `SAFE` ones are for `inputs` alone.
      seed: of the initial noise.
      batch_size: prompts at a time, over all devices.
      sampler: `SAMPLERS`, and
      num_steps: its steps, and
      guidance_scale: as for a picture.
      inputs: whether the second moments of the layers' inputs are kept too.
      trajectory: who draws, one of `TRAJECTORIES`: the "base", no expert being on, or "experts",
        each the prompts of its own category (its name) and the base the others.
      kept: a file for what was counted so far, written every few minutes and at the end; a count
        goes on from there. It is the caller's to remove. None keeps nothing.
      progress: takes a line after every batch: done, time left.

    Raises:
      UserError: as `check`, or steps that the sampler cannot make.
      SystemExit: stopped by SIGTERM or Ctrl-C, after a batch; what was counted is in `kept`.
    """
    check(
        experts, prompts, categories, batch_size=batch_size, sampler=sampler, inputs=inputs,
        trajectory=trajectory,
    )  # fmt: skip
    names = moments_of.voting(categories)
    count = _Count(
        pipeline, experts, prompts, categories, names, seed, batch_size, sampler, num_steps,
        guidance_scale, inputs, trajectory,
    )  # fmt: skip
    settings = count.settings() if kept is not None else ""
    if kept is not None:
        count.seen = count.seen.restored(kept, settings)
        if count.seen.prompts:
            progress(f"statistics: going on from prompt {count.seen.prompts}")
        elif kept.is_file():
            progress(f"statistics: {kept} was counted with other settings; it is left out")
    first, written = count.seen.prompts, time.monotonic()
    pace = Pace(len(prompts) - first)
    with stop_signal() if kept is not None else contextlib.nullcontext(Stop()) as stop:
        for start in range(first, len(prompts), count.batch_size):
            count.add(start)
            done, left = count.seen.prompts, pace.left(count.seen.prompts - first)
            progress(f"statistics: {done}/{len(prompts)} prompts, {left:.0f} s left")
            due = done == len(prompts) or time.monotonic() - written > KEEP_SECONDS
            if kept is not None and (stop.asked or due):
                count.seen.save(kept, settings)
                written = time.monotonic()
            if stop.asked:
                progress(f"stopped: {done} prompts are counted; the same command goes on")
                raise SystemExit(128 + stop.asked)
    return count.statistics()


def check(
    experts: Experts,
    prompts: Sequence[str],
    categories: Sequence[str],
    *,
    batch_size: int,
    sampler: str,
    inputs: bool,
    trajectory: str,
) -> None:
    """What can be wrong with `count_votes` without its pipeline, for before that is loaded.

    Raises:
      UserError: no prompts, or fewer than two of a category, or an unknown sampler; with `inputs`,
        none of an expert's category or no safe ones, or an expert that adapts a convolution.
    """
    names = moments_of.voting(categories)
    if len(prompts) != len(categories) or not names:
        raise UserError(
            f"{len(prompts)} prompts with {len(categories)} categories: give prompts of the "
            "experts' categories"
        )
    if lonely := [name for name in names if list(categories).count(name) < 2]:
        raise UserError(f"fewer than two prompts of {', '.join(lonely)}: each half needs one")
    if trajectory not in TRAJECTORIES:
        raise UserError(
            f"the trajectory is {trajectory!r}: it must be one of {', '.join(TRAJECTORIES)}"
        )
    if sampler not in SAMPLERS:
        raise UserError(f"the sampler is {sampler!r}: it must be one of {', '.join(SAMPLERS)}")
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}: it must be 1 or more")
    if inputs:
        moments_of.check_categories(categories, experts)
        moments_of.check_layers(experts)
    if trajectory == "experts":
        moments_of.check_categories(categories, experts, safe=False)


class _Count:
    """The drawing of the prompts, a batch at a time, and what is seen on the way.

    Attributes:
      batch_size: prompts at a time, over all devices.
      seen: so far.
    """

    def __init__(
        self,
        pipeline: Any,
        experts: Experts,
        prompts: Sequence[str],
        categories: Sequence[str],
        names: list[str],
        seed: int,
        batch_size: int,
        sampler: str,
        num_steps: int,
        guidance_scale: float,
        inputs: bool,
        trajectory: str,
    ):
        self._pipeline, self._experts, self._prompts = pipeline, experts, prompts
        self._categories, self._names, self._num_steps = categories, names, num_steps
        self._mesh = sharding.make_mesh()
        devices = self._mesh.shape["data"]
        self.batch_size = max(devices, min(batch_size, len(prompts)) // devices * devices)
        self._shares = moments_of.shares(categories, experts) if inputs else None
        self._split = sharding.batch_sharding(self._mesh)
        whole = sharding.replicated(self._mesh)
        self._table = SAMPLERS[sampler](pipeline.schedule, num_steps)
        self._rows = jax.tree.map(np.asarray, self._table.rows())
        stacked = experts.stacked(weighted=False)
        self.seen = _nothing(experts, stacked, 2 * len(names), inputs)
        self.seen.moments = jax.device_put(self.seen.moments, whole)
        self._stacked = jax.device_put(stacked, whole)
        self._params = jax.device_put(pipeline.unet_params, whole)
        drawing = experts if trajectory == "experts" else None
        self._step = _make_step(pipeline.unet, guidance_scale, drawing)
        self._own = experts.of_categories(categories)
        self._votes = np.array([x != SAFE for x in categories])
        self._cells = _halves(categories) * len(names) + np.array(
            [names.index(x) if x != SAFE else 0 for x in categories]
        )
        negative = pipeline.encode_negative([""] * self.batch_size)
        self._negative = jax.device_put(negative, self._split)
        self._seeds = np.random.SeedSequence(seed).generate_state(len(prompts))
        self._about = {
            "prompts": len(prompts),
            "prompts_sha256": storage.digest(list(prompts)),
            "seed": seed,
            "sampler": sampler,
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "trajectory": trajectory,
        }

    def settings(self) -> str:
        """A digest of all that the sums depend on."""
        sources = self._pipeline.sources
        return storage.digest(
            {
                **self._about,
                "version": 1,  # of what is kept
                "bands": BANDS,
                "categories": list(self._categories),
                "experts": self._experts.hashes,
                "batch_size": self.batch_size,
                "inputs": self._shares is not None,
                "base": storage.hash_parts(sources, [name for name in sources if name != "vae"]),
                "computed_in": str(jnp.dtype(self._pipeline.unet.dtype)),
            }
        )

    def add(self, start: int) -> None:
        """Draws the batch that begins with a prompt, and adds what is seen."""
        seen, count = self.seen, len(self._prompts)
        index = np.arange(start, start + self.batch_size)
        real = index < count
        index = np.minimum(index, count - 1)
        votes_now = real & self._votes[index]
        of_rows = jax.tree.map(lambda x: x[index] * real[:, None], self._shares)
        told = self._pipeline.encode_prompts([self._prompts[i] for i in index])
        x = initial_latents(self._seeds[index], self._pipeline.latent_shape)
        x = x * np.float32(self._table.start)
        told, x, drawn_by = jax.device_put((told, x, self._own[index]), self._split)
        carry = (x, jnp.zeros_like(x))
        for i in range(self._num_steps):
            row = jax.tree.map(lambda column, i=i: column[i], self._rows)
            with jax.set_mesh(self._mesh):  # over which attention spreads a kernel of its own
                carry, counts, seen.moments = self._step(
                    self._params, self._stacked, carry, row, told, self._negative, drawn_by,
                    of_rows, seen.moments,
                )  # fmt: skip
            band, cell = i * BANDS // self._num_steps, self._cells[index[votes_now]]
            for layer, of_layer in jax.device_get(counts).items():
                for sums, of_units in zip((seen.outputs, seen.ranks), of_layer, strict=True):
                    if layer in sums:
                        np.add.at(sums[layer][:, band], cell, of_units[votes_now])
        seen.prompts = min(start + self.batch_size, count)

    def statistics(self) -> Statistics:
        """What was seen."""

        def shaped(x: np.ndarray) -> np.ndarray:
            return x.reshape(2, len(self._names), *x.shape[1:]).astype(np.float32)

        return Statistics(
            self._experts.hashes,
            self._names,
            {layer: shaped(x) for layer, x in self.seen.outputs.items()},
            {layer: shaped(x) for layer, x in self.seen.ranks.items()},
            self._about,
            moments_of.inputs(jax.device_get(self.seen.moments), self._experts),
        )


def _nothing(
    experts: Experts, stacked: Mapping[str, tuple[Any, Any]], cells: int, inputs: bool
) -> Counted:
    """Zeros to add to; `cells`: halves of the prompts times categories."""

    def zeros(x: Any) -> np.ndarray:
        return np.zeros((cells, BANDS, *x), np.int64)

    return Counted(
        {layer: zeros(b.shape[0::2]) for layer, (_, b) in stacked.items()},
        {layer: zeros(stacked[layer][1].shape[:2]) for layer in experts.of_one_rank()},
        moments_of.nothing(stacked) if inputs else {},
    )


def _halves(categories: Sequence[str]) -> np.ndarray:
    """0 and 1 in turn within each category."""
    seen: dict[str, int] = {}
    halves = []
    for name in categories:
        halves.append(seen.get(name, 0) % 2)
        seen[name] = seen.get(name, 0) + 1
    return np.array(halves)


def _make_step(unet: Any, guidance_scale: float, drawing: Experts | None) -> Callable[..., Any]:
    """Compiles one step of drawing with its votes: by layer, (b, experts, out) and (.., rank).

    `drawing`: the experts, if each row is to be drawn by its own.
    """

    @functools.partial(jax.jit, donate_argnames="moments")
    def step(params, stacked, carry, row, told, negative, drawn_by, shares, moments):
        votes: dict[str, tuple[Array, Array]] = {}
        moments = dict(moments)
        variables = {"params": params}
        if drawing is not None:
            variables["lora"] = drawing.routed(stacked, drawn_by)

        def heard(see: Callable[[str, nn.Module, Array], None], told: Any) -> Array:
            def listen(call, args, kwargs, context):
                name = ".".join(context.module.path)
                if context.method_name == "__call__" and name in stacked:
                    see(name, context.module, args[0].astype(jnp.float32))
                return call(*args, **kwargs)

            with nn.intercept_methods(listen):
                return unet.apply(variables, x, timesteps, *told)

        def see(name: str, module: nn.Module, inputs: Array) -> None:
            inner, outer = _activity(module, inputs, *stacked[name])
            votes[name] = _winners(outer), _winners(inner)
            if name in moments:
                moments[name] = moments_of.added(moments[name], inputs, inner, shares)

        def see_empty(name: str, module: nn.Module, inputs: Array) -> None:
            if name in moments:
                moments[name] = moments_of.added_empty(moments[name], inputs, shares)

        x = carry[0]
        timesteps = jnp.full(len(x), row["timesteps"])
        output = heard(see, told)
        if guidance_scale > 1:
            away = heard(see_empty, negative)
            output = away + guidance_scale * (output - away)
        return advance(row, carry, output.astype(jnp.float32)), votes, moments

    return step


def _activity(
    module: nn.Module, x: Array, a: Float[Array, "e *in r"], b: Float[Array, "e r out"]
) -> tuple[Float[Array, "b e t r"], Float[Array, "b e t out"]]:
    """What every expert makes of an input, between its factors and after them."""
    if isinstance(module, Conv):
        inner = jax.vmap(lambda kernel: module._convolve(x, kernel), out_axes=1)(a)
    else:
        inner = jnp.einsum("b...i,eir->be...r", x, a, precision="highest")
    inner = inner.reshape(*inner.shape[:2], -1, inner.shape[-1])
    return inner, jnp.einsum("betr,ero->beto", inner, b)


def _winners(activity: Float[Array, "b e t u"]) -> Int[Array, "b e u"]:
    """Of b rows, how many tokens each expert wins at each unit; none where all are 0."""
    size = jnp.abs(activity)
    best = jnp.argmax(size, 1, keepdims=True)
    won = (jnp.arange(size.shape[1])[None, :, None, None] == best) & (size > 0)
    return won.sum(2)
