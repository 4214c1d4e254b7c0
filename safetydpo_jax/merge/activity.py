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
      kept: a file for what was counted so far, written every few minutes; a count that was stopped
        goes on from there. It is the caller's to remove. None keeps nothing.
      progress: takes a line after every batch: done, time left.

    Raises:
      UserError: no prompts, or fewer than two of a category, or an unknown sampler; with `inputs`,
        none of an expert's category or no safe ones, or an expert that adapts a convolution.
      SystemExit: stopped by SIGTERM or Ctrl-C, after a batch; what was counted is in `kept`.
    """
    names = sorted(set(categories) - {SAFE})
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
    if trajectory == "experts":
        moments_of.check_categories(categories, experts, safe=False)
    mesh = sharding.make_mesh()
    shares = moments_of.shares(categories, experts) if inputs else None
    devices = mesh.shape["data"]
    batch_size = max(devices, min(batch_size, len(prompts)) // devices * devices)
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    table = SAMPLERS[sampler](pipeline.schedule, num_steps)
    rows = jax.tree.map(np.asarray, table.rows())
    stacked = experts.stacked(weighted=False)
    counted = _nothing(experts, stacked, 2 * len(names), inputs)
    counted.moments = jax.device_put(counted.moments, whole)
    stacked = jax.device_put(stacked, whole)
    params = jax.device_put(pipeline.unet_params, whole)
    step = _make_step(pipeline.unet, guidance_scale, experts if trajectory == "experts" else None)
    own = experts.of_categories(categories)
    halves = _halves(categories)
    votes = np.array([x != SAFE for x in categories])
    cells = halves * len(names) + np.array([names.index(x) if x != SAFE else 0 for x in categories])
    negative = jax.device_put(pipeline.encode_negative([""] * batch_size), split)
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts))
    about = {
        "prompts": len(prompts),
        "prompts_sha256": storage.digest(list(prompts)),
        "seed": seed,
        "sampler": sampler,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "trajectory": trajectory,
    }
    settings = ""
    if kept is not None:
        parts = [name for name in pipeline.sources if name != "vae"]
        settings = storage.digest(
            {
                **about,
                "version": 1,  # of what is kept
                "bands": BANDS,
                "categories": list(categories),
                "experts": experts.hashes,
                "batch_size": batch_size,
                "inputs": inputs,
                "base": storage.hash_parts(pipeline.sources, parts),
                "computed_in": str(jnp.dtype(pipeline.unet.dtype)),
            }
        )
        counted = counted.restored(kept, settings)
        if counted.prompts:
            progress(f"statistics: going on from prompt {counted.prompts}")
        elif kept.is_file():
            progress(f"statistics: {kept} was counted with other settings; it is left out")

    def count(start: int) -> None:
        """Draws the batch that begins with a prompt, and adds what is seen."""
        index = np.arange(start, start + batch_size)
        real = index < len(prompts)
        index = np.minimum(index, len(prompts) - 1)
        votes_now = real & votes[index]
        of_rows = jax.tree.map(lambda x: x[index] * real[:, None], shares)
        told = pipeline.encode_prompts([prompts[i] for i in index])
        x = initial_latents(seeds[index], pipeline.latent_shape) * np.float32(table.start)
        told, x, drawn_by = jax.device_put((told, x, own[index]), split)
        carry = (x, jnp.zeros_like(x))
        for i in range(num_steps):
            row = jax.tree.map(lambda column, i=i: column[i], rows)
            with jax.set_mesh(mesh):  # over which attention spreads a kernel of its own
                carry, counts, counted.moments = step(
                    params, stacked, carry, row, told, negative, drawn_by, of_rows, counted.moments
                )
            band, cell = i * BANDS // num_steps, cells[index[votes_now]]
            for layer, of_layer in jax.device_get(counts).items():
                for sums, of_units in zip((counted.outputs, counted.ranks), of_layer, strict=True):
                    if layer in sums:
                        np.add.at(sums[layer][:, band], cell, of_units[votes_now])
        counted.prompts = min(start + batch_size, len(prompts))

    first, written = counted.prompts, time.monotonic()
    pace = Pace(len(prompts) - first)
    with stop_signal() if kept is not None else contextlib.nullcontext(Stop()) as stop:
        for start in range(first, len(prompts), batch_size):
            count(start)
            done, left = counted.prompts, pace.left(counted.prompts - first)
            progress(f"statistics: {done}/{len(prompts)} prompts, {left:.0f} s left")
            due = time.monotonic() - written > KEEP_SECONDS
            if kept is not None and (stop.asked or due):
                counted.save(kept, settings)
                written = time.monotonic()
            if stop.asked:
                progress(f"stopped: {done} prompts are counted; the same command goes on")
                raise SystemExit(128 + stop.asked)

    def shaped(x: np.ndarray) -> np.ndarray:
        return x.reshape(2, len(names), *x.shape[1:]).astype(np.float32)

    return Statistics(
        experts.hashes,
        names,
        {layer: shaped(x) for layer, x in counted.outputs.items()},
        {layer: shaped(x) for layer, x in counted.ranks.items()},
        about,
        moments_of.inputs(jax.device_get(counted.moments), experts),
    )


def _nothing(
    experts: Experts, stacked: Mapping[str, tuple[Any, Any]], cells: int, inputs: bool
) -> Counted:
    """Zeros to add to; `cells`: halves of the prompts times categories."""

    def zeros(x: Any) -> np.ndarray:
        return np.zeros((cells, BANDS, *x), np.int64)

    return Counted(
        {layer: zeros(b.shape[0::2]) for layer, (_, b) in stacked.items()},
        {layer: zeros(stacked[layer][1].shape[:2]) for layer in _of_one_rank(experts)},
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


def _of_one_rank(experts: Experts) -> list[str]:
    """The layers in which all experts have the same rank."""
    return [
        layer
        for layer in experts.places
        if all(layer in file.ranks for file in experts.files)
        and len({file.ranks[layer] for file in experts.files}) == 1
    ]


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
