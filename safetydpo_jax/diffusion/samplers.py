"""Samplers: one table of coefficients a sampler, one compiled scan for all of them.

Every deterministic sampler of a linear-Gaussian schedule is the same step with other numbers,

    x0     = x_to_x0 x + out_to_x0 model(x, t)
    x_next = keep x + pull x0 + memory x0_before,

so a sampler here is a function that fills in a `SamplerTable`, in float64, before anything is
compiled. (Euler's x is a multiple of this x, and the multiple goes into the table as well.)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from safetydpo_jax import sharding
from safetydpo_jax.diffusion.schedule import DEFAULT_SPACING, NoiseSchedule
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.conditioning import Conditioning


@dataclasses.dataclass(frozen=True)
class SamplerTable:
    """The coefficients of the step above, float64, one row a model evaluation, noisy to clean.

    The first x is the standard normal noise times `start`.
    """

    timesteps: np.ndarray
    x_to_x0: np.ndarray
    out_to_x0: np.ndarray
    keep: np.ndarray
    pull: np.ndarray
    memory: np.ndarray
    start: float = 1.0

    def rows(self) -> dict[str, Array]:
        """What the scan runs over: each column as a float32 (steps,) array."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del columns["start"]
        return {name: jnp.asarray(x, jnp.float32) for name, x in columns.items()}


def ddim_table(schedule: NoiseSchedule, num_steps: int) -> SamplerTable:
    """DDIM with eta = 0 (Song et al. 2021, arXiv 2010.02502, equation 12).

    As in diffusers, a step goes T // num_steps timesteps down whatever the spacing.
    """
    timesteps = schedule.timesteps(num_steps, "ddim")
    abar = schedule.alphas_cumprod
    before = timesteps - schedule.num_train_timesteps // num_steps
    final = 1.0 if schedule.set_alpha_to_one else abar[0]
    abar_next = np.where(before >= 0, abar[np.maximum(before, 0)], final)
    alpha, sigma = np.sqrt(abar[timesteps]), np.sqrt(1 - abar[timesteps])
    keep = np.sqrt(1 - abar_next) / sigma
    return SamplerTable(
        timesteps,
        *_x0_columns(schedule, alpha, sigma),
        keep=keep,
        pull=np.sqrt(abar_next) - keep * alpha,
        memory=np.zeros(num_steps),
    )


def dpmsolver_table(schedule: NoiseSchedule, num_steps: int) -> SamplerTable:
    """DPM-Solver++ (2M), midpoint, ending at zero noise (Lu et al. 2022, arXiv 2211.01095).

    The first and the last step are of first order, as diffusers has them.
    """
    schedule.require_plain_solver("dpmsolver++")
    timesteps = schedule.timesteps(num_steps, "dpmsolver++")
    abar = _never_zero(schedule)
    alpha = np.append(np.sqrt(abar[timesteps]), 1.0)
    sigma = np.append(np.sqrt(1 - abar[timesteps]), 0.0)
    keep = sigma[1:] / sigma[:-1]
    pull = alpha[1:] - keep * alpha[:-1]  # alpha_next (1 - exp(-h))
    log_snr = np.log(alpha[:-1] / sigma[:-1])
    stride = np.diff(log_snr)  # h of every step but the last, whose end is infinitely clean
    memory = np.zeros(num_steps)
    memory[1:-1] = -0.5 * pull[1:-1] * stride[1:] / stride[:-1]
    return SamplerTable(
        timesteps,
        *_x0_columns(schedule, alpha[:-1], sigma[:-1]),
        keep=keep,
        pull=pull - memory,
        memory=memory,
    )


def euler_table(schedule: NoiseSchedule, num_steps: int) -> SamplerTable:
    """Euler's method for the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364).

    It moves x / alpha = x0 + sigma noise straight along its slope, the noise that the model sees,
    to the next sigma, the last being 0. Between whole timesteps sigma is interpolated.
    """
    schedule.require_plain_solver("euler")
    timesteps = schedule.timesteps(num_steps, "euler")
    abar = _never_zero(schedule)
    sigma = np.interp(timesteps, np.arange(len(abar)), np.sqrt((1 - abar) / abar))
    alpha = 1 / np.sqrt(1 + np.append(sigma, 0.0) ** 2)  # what makes x of variance 1 again
    shrink = np.append(sigma[1:], 0.0) / sigma
    # diffusers begins with sigma times the noise, not sqrt(1 + sigma^2), unless it is leading.
    leading = (schedule.timestep_spacing or DEFAULT_SPACING["euler"]) == "leading"
    return SamplerTable(
        timesteps,
        *_x0_columns(schedule, alpha[:-1], sigma * alpha[:-1]),
        keep=shrink * alpha[1:] / alpha[:-1],
        pull=(1 - shrink) * alpha[1:],
        memory=np.zeros(num_steps),
        start=1.0 if leading else sigma[0] * alpha[0],
    )


def _never_zero(schedule: NoiseSchedule) -> np.ndarray:
    """abar, at its end diffusers' number instead of 0, so that the logarithm of SNR is finite."""
    abar = schedule.alphas_cumprod.copy()
    if schedule.rescale_betas_zero_snr:
        abar[-1] = 2.0**-24
    return abar


def _x0_columns(schedule: NoiseSchedule, alpha: np.ndarray, sigma: np.ndarray):
    """(x_to_x0, out_to_x0): how x0 follows from x and the model's answer."""
    if schedule.prediction_type == "v_prediction":
        return alpha, -sigma
    if (alpha == 0).any():
        raise UserError(
            "epsilon prediction says nothing about the picture at zero terminal SNR: use timestep_"
            "spacing leading, the dpmsolver++ sampler, or a schedule without rescale_betas_zero_snr"
        )
    return 1 / alpha, -sigma / alpha


SAMPLERS = {"ddim": ddim_table, "dpmsolver++": dpmsolver_table, "euler": euler_table}


def advance(
    row: Mapping[str, Array], carry: tuple[Array, Array], output: Array
) -> tuple[Array, Array]:
    """One step: (x, x0 before) and the model's output to the next x and this x0; float32.

    Args:
      row: of `SamplerTable.rows`.
      carry: latents; before the first step any x0 will do.
      output: of the model, guided or not.
    """
    x, x0_before = carry
    x0 = row["x_to_x0"] * x + row["out_to_x0"] * output
    return row["keep"] * x + row["pull"] * x0 + row["memory"] * x0_before, x0


# (params, adapters or None, latents, conditioning, negative or None) -> latents
Sampler = Callable[..., Float[Array, "b h w c"]]


def make_sampler(
    unet: Any,
    schedule: NoiseSchedule,
    *,
    sampler: str = "ddim",
    num_steps: int = 25,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    mesh: Mesh | None = None,
) -> Sampler:
    """A sampler: noise in, clean latents out; compiled at the first call of a shape.

    Args:
      unet: a module with `apply(variables, latents, timesteps, *conditioning)`, hashable.
      schedule: the checkpoint's noise schedule.
      sampler: "ddim" (eta 0), "dpmsolver++" (2M) or "euler".
      num_steps: number of model evaluations.
      guidance_scale: classifier-free guidance; at 1 or less the negative branch is not computed.
      guidance_rescale: 0 to 1, Lin et al. 2023 (arXiv 2305.08891), section 3.4.
      mesh: of devices that each draw a share of the rows.

    Returns:
      A function `(params, adapters, latents (b,h,w,c), conditioning, negative)` -> latents
      (b,h,w,c) float32. `adapters` None is the base model; `negative`, the conditioning that
      guidance steers away from, may be None without guidance.

    Raises:
      UserError: unknown sampler, or a number of steps the schedule cannot give.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"the sampler is {sampler!r}: it must be one of {', '.join(SAMPLERS)}")
    table = SAMPLERS[sampler](schedule, num_steps)
    guided = guidance_scale > 1
    run = _scan(unet, guided, guided and guidance_rescale != 0, mesh)

    def sample(
        params: Mapping,
        adapters: Mapping | None,
        latents: Float[Array, "b h w c"],
        conditioning: Conditioning,
        negative: Conditioning | None,
    ) -> Float[Array, "b h w c"]:
        variables = {"params": params} if adapters is None else {"params": params, "lora": adapters}
        latents = jnp.asarray(latents, jnp.float32) * jnp.float32(table.start)
        guidance = jnp.float32(guidance_scale), jnp.float32(guidance_rescale)
        return run(variables, latents, conditioning, negative, table.rows(), guidance)

    return sample


@functools.lru_cache(maxsize=16)
def _scan(unet: Any, guided: bool, rescaled: bool, mesh: Mesh | None) -> Callable[..., Array]:
    """The compiled loop; samplers of as many steps are one program with other numbers."""

    def predict(variables, latents, timestep, conditioning, negative, guidance):
        if not guided:
            timesteps = jnp.full(len(latents), timestep)
            return unet.apply(variables, latents, timesteps, *conditioning)
        told = jax.tree.map(lambda *both: jnp.concatenate(both), negative, conditioning)
        timesteps = jnp.full(2 * len(latents), timestep)
        both = unet.apply(variables, jnp.concatenate([latents, latents]), timesteps, *told)
        negative, positive = jnp.split(both.astype(jnp.float32), 2)
        scale, rescale = guidance
        answer = negative + scale * (positive - negative)
        if not rescaled:
            return answer
        axes = tuple(range(1, answer.ndim))
        ratio = positive.std(axes, keepdims=True) / answer.std(axes, keepdims=True)
        return answer * (rescale * ratio + 1 - rescale)

    def run(variables, latents, conditioning, negative, rows, guidance):
        def step(carry, row):
            output = predict(
                variables, carry[0], row["timesteps"], conditioning, negative, guidance
            )
            return advance(row, carry, output.astype(jnp.float32)), None

        (latents, _), _ = jax.lax.scan(step, (latents, jnp.zeros_like(latents)), rows)
        return latents

    return sharding.spread(run, mesh, False, True, True, True, False, False)


def initial_latents(seeds: Sequence[int] | np.ndarray, shape: tuple[int, ...]) -> Array:
    """Standard normal noise, each picture's from its own seed, whatever it is batched with.

    Args:
      seeds: n integers, 0 .. 2**32 - 1.
      shape: of one picture's latents, (h, w, c).

    Returns:
      float32 (n, h, w, c).

    Raises:
      UserError: a seed that is not such an integer.
    """
    return _noise(jnp.asarray(_checked(seeds)), tuple(shape))


def _checked(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    seeds = np.asarray(seeds)
    whole = seeds.ndim == 1 and seeds.dtype.kind in "iu"
    if not whole or (seeds < 0).any() or (seeds >= 2**32).any():
        raise UserError("seeds must be a list of integers from 0 to 4294967295, one a picture")
    return seeds.astype(np.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _noise(seeds: Array, shape: tuple[int, ...]) -> Array:
    root = jax.random.key(0)
    return jax.vmap(lambda seed: jax.random.normal(jax.random.fold_in(root, seed), shape))(seeds)


def iterate_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] | np.ndarray,
    *,
    adapters: Mapping | None = None,
    batch_size: int = 32,
    sampler: str = "ddim",
    num_steps: int = 25,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    negative_prompt: str = "",
    matmul_precision: str | None = None,
) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
    """Draws pictures batch by batch, in order; see `draw_pictures`."""
    if len(prompts) != len(seeds) or len(prompts) == 0 or batch_size < 1:
        raise UserError(
            f"{len(prompts)} prompts, {len(seeds)} seeds, batch_size {batch_size}: "
            "give as many seeds as prompts, and at least one of each"
        )
    sample = make_sampler(
        pipeline.unet,
        pipeline.schedule,
        sampler=sampler,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        mesh=pipeline.mesh,
    )
    size, seeds = min(batch_size, len(prompts)) * pipeline.num_devices, _checked(seeds)
    negative = pipeline.encode_negative([negative_prompt] * size)
    for start in range(0, len(prompts), size):
        wanted = min(size, len(prompts) - start)
        # The last batch is filled up with copies of its last picture: one shape, one compilation.
        index = start + np.minimum(np.arange(size), wanted - 1)
        conditioning = pipeline.encode_prompts([prompts[i] for i in index])
        noise = initial_latents(seeds[index], pipeline.latent_shape)
        # A context around a yield would leak into the caller, so it closes before.
        with jax.default_matmul_precision(matmul_precision):
            latents = sample(pipeline.unet_params, adapters, noise, conditioning, negative)
            if not jnp.isfinite(latents).all():
                raise UserError(
                    f"the model drew NaN or infinity among pictures {start} to "
                    f"{start + wanted - 1}: the weights or the adapters hold such values, or are "
                    "too large"
                )
            pictures = pipeline.decode_latents(latents)
        yield np.asarray(pictures)[:wanted]


def draw_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] | np.ndarray,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> UInt8[np.ndarray, "n H W 3"]:
    """Draws one picture for every prompt.

    Args:
      pipeline: a `models.pretrained.Pipeline`.
      prompts: n texts.
      seeds: n integers; a picture depends on its prompt and its seed, not on its batch.
      progress: called with (pictures done, n) after every batch.
      **options: of `iterate_pictures`: adapters (a "lora" collection), batch_size (on each of the
        pipeline's devices), sampler, num_steps, guidance_scale, guidance_rescale, negative_prompt,
        matmul_precision ("float32", or "bfloat16" operands with float32 sums, faster; None is
        JAX's default).

    Returns:
      uint8 (n, H, W, 3).

    Raises:
      UserError: not as many seeds as prompts, none at all, an option that cannot be, or a model
        that draws NaN.
    """
    batches = []
    for batch in iterate_pictures(pipeline, prompts, seeds, **options):
        batches.append(batch)
        if progress is not None:
            progress(sum(map(len, batches)), len(prompts))
    return np.concatenate(batches)
