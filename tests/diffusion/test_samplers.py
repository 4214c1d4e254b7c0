"""Samplers against PyTorch diffusers, and the properties the rest relies on."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.diffusion import (
    NoiseSchedule,
    draw_pictures,
    initial_latents,
    make_sampler,
    samplers,
)
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.conditioning import Conditioning
from tests.diffusion.fakes import EMBEDS, LATENTS, NEGATIVE, SHAPE, FakeUNet, torch_unet

# diffusers' DPM-Solver hands NumPy 2 a torch tensor in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

UNET = FakeUNet()
PARAMS = {"gain": jnp.float32(1)}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
STEPS = (1, 2, 7, 20, 30)
BETAS = (
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
)


def scheduler_config(index, spacing, prediction, zero_snr, alpha_one):
    """One config; what is not under test by name varies along with `index`."""
    return {
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": alpha_one,
        "steps_offset": (index // 2).bit_count() % 2,
        **BETAS[index % 3],
    }


CHOICES = itertools.product(
    ("leading", "trailing", "linspace"), ("epsilon", "v_prediction"), (False, True), (False, True)
)
COMBINATIONS = [
    (sampler, index, choice)
    for index, choice in enumerate(CHOICES)
    for sampler in SCHEDULERS
    if sampler == "ddim" or choice[-1]  # set_alpha_to_one is DDIM's alone
]


def torch_sample(scheduler, num_steps, guidance_scale, guidance_rescale=0.0):
    """diffusers' own loop: guidance as in StableDiffusionPipeline.__call__."""
    torch = pytest.importorskip("torch")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    latents, embeds, negative = (torch.from_numpy(x) for x in (LATENTS, EMBEDS, NEGATIVE))
    scheduler.set_timesteps(num_steps)
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, timestep)
        output = torch_unet(inputs, timestep, embeds)
        if guidance_scale > 1:
            uncond = torch_unet(inputs, timestep, negative)
            guided = uncond + guidance_scale * (output - uncond)
            output = rescale_noise_cfg(guided, output, guidance_rescale)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents.numpy()


def jax_sample(schedule, sampler, num_steps, guidance_scale, guidance_rescale=0.0, **arguments):
    sample = make_sampler(
        UNET,
        schedule,
        sampler=sampler,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
    )
    inputs = {
        "params": PARAMS,
        "adapters": None,
        "latents": jnp.asarray(LATENTS),
        "conditioning": Conditioning(jnp.asarray(EMBEDS)),
        "negative": Conditioning(jnp.asarray(NEGATIVE)),
    }
    return np.asarray(sample(**(inputs | arguments)))


def relative_error(got, wanted):
    return np.abs(got - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("sampler", "index", "choice"), COMBINATIONS)
def test_equals_diffusers(sampler, index, choice):
    pytest.importorskip("torch")
    import diffusers

    config = scheduler_config(index, *choice)
    num_steps = STEPS[index % len(STEPS)]
    schedule = NoiseSchedule.from_config(config)
    first = schedule.timesteps(num_steps, sampler)[0]
    if sampler == "ddim" and choice[1] == "epsilon" and schedule.alphas_cumprod[first] == 0:
        with pytest.raises(UserError, match="zero terminal SNR"):  # diffusers divides by zero
            jax_sample(schedule, sampler, num_steps, 1.0)
        return
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config)
    guidance_scale = (1.0, 3.0)[index // 3 % 2]
    wanted = torch_sample(scheduler, num_steps, guidance_scale)
    got = jax_sample(schedule, sampler, num_steps, guidance_scale)
    timesteps = schedule.timesteps(num_steps, sampler).astype(np.float32)
    np.testing.assert_array_equal(timesteps, scheduler.timesteps)
    # At zero SNR their x is 4096 times ours, and loses as many digits.
    assert relative_error(got, wanted) <= (1e-3 if sampler == "euler" else 1e-4)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_guidance_rescale_equals_diffusers(sampler):
    pytest.importorskip("torch")
    import diffusers

    config = scheduler_config(0, "trailing", "v_prediction", True, True)
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config)
    wanted = torch_sample(scheduler, 10, 7.5, 0.7)
    got = jax_sample(NoiseSchedule.from_config(config), sampler, 10, 7.5, 0.7)
    assert relative_error(got, wanted) <= 1e-4


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_spacing_left_to_the_sampler_equals_diffusers(sampler):
    """Stable Diffusion 1.5's config names no spacing: each diffusers class takes its own."""
    pytest.importorskip("torch")
    import diffusers

    config = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config)
    got = jax_sample(NoiseSchedule.from_config(config), sampler, 25, 7.5)
    assert relative_error(got, torch_sample(scheduler, 25, 7.5)) <= 1e-4


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_perfect_model_gives_the_picture_back(sampler):
    """With the true noise of one picture as the answer, every sampler ends at that picture."""
    schedule = NoiseSchedule(beta_schedule="scaled_linear", set_alpha_to_one=True)
    picture = jnp.asarray(LATENTS[::-1].copy())

    class Oracle:
        def apply(self, variables, latents, timesteps, *conditioning):
            abar = schedule.alphas_cumprod  # of whole timesteps; Euler goes between them
            sigma = jnp.interp(timesteps[0], jnp.arange(1000), jnp.sqrt((1 - abar) / abar))
            alpha = 1 / jnp.sqrt(1 + sigma**2)
            return (latents - alpha * picture) / (sigma * alpha)

    sample = make_sampler(Oracle(), schedule, sampler=sampler, num_steps=12, guidance_scale=1.0)
    result = sample({}, None, jnp.asarray(LATENTS), Conditioning(jnp.asarray(EMBEDS)), None)
    np.testing.assert_allclose(result, picture, atol=1e-4)


def test_adapters_reach_the_model_and_none_is_the_base():
    schedule = NoiseSchedule()
    base = jax_sample(schedule, "ddim", 4, 3.0)
    nothing = jax_sample(schedule, "ddim", 4, 3.0, adapters={"shift": jnp.float32(0)})
    shifted = jax_sample(schedule, "ddim", 4, 3.0, adapters={"shift": jnp.float32(0.1)})
    np.testing.assert_array_equal(base, nothing)
    assert relative_error(shifted, base) > 1e-3


def test_guidance_of_one_never_reads_the_negative():
    schedule = NoiseSchedule()
    got = jax_sample(schedule, "ddim", 4, 1.0, negative=None)
    np.testing.assert_array_equal(got, jax_sample(schedule, "ddim", 4, 1.0))


def test_samplers_of_as_many_steps_are_compiled_once():
    schedule = NoiseSchedule.from_config({"clip_sample": False})
    again = NoiseSchedule.from_config({"clip_sample": False})
    samplers._scan.cache_clear()
    for sampler, guidance_scale in itertools.product(SCHEDULERS, (2.0, 3.0)):
        for noise in (schedule, again):
            jax_sample(noise, sampler, 3, guidance_scale)
    assert samplers._scan(UNET, True, False, None)._cache_size() == 1
    jax_sample(schedule, "ddim", 4, 2.0)
    assert samplers._scan(UNET, True, False, None)._cache_size() == 2


def test_noise_belongs_to_the_seed_not_to_the_batch():
    together = initial_latents([5, 2**32 - 1, 0], SHAPE)
    alone = initial_latents(np.array([0], np.uint32), SHAPE)
    np.testing.assert_array_equal(together[2], alone[0])
    many = np.asarray(initial_latents(np.arange(2000), SHAPE))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.01


class FakePipeline:
    """What `draw_pictures` uses of a Pipeline."""

    unet = UNET
    unet_params = PARAMS
    schedule = NoiseSchedule()
    latent_shape = SHAPE
    mesh, num_devices = None, 1

    def __init__(self):
        self.sizes = []

    def encode_prompts(self, prompts):
        self.sizes.append(len(prompts))
        codes = [[len(text), text.count("a")] for text in prompts]
        return Conditioning(jnp.asarray(codes, jnp.float32)[:, :, None] * jnp.ones(6) / 10)

    encode_negative = encode_prompts

    def decode_latents(self, latents):
        return np.asarray(jnp.clip(latents[..., :3] * 50 + 128, 0, 255)).astype(np.uint8)


def test_a_picture_does_not_depend_on_its_batch():
    pipeline, seen = FakePipeline(), []
    prompts, seeds = ["a", "bb", "aaa", "dddd", "e"], [3, 1, 4, 1, 5]
    options = {"num_steps": 4, "guidance_scale": 3.0, "negative_prompt": "aa"}
    pictures = draw_pictures(
        pipeline, prompts, seeds, batch_size=2, progress=lambda *at: seen.append(at), **options
    )
    assert pictures.shape == (5, 5, 5, 3)
    assert pipeline.sizes == [2, 2, 2, 2]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    alone = draw_pictures(pipeline, prompts[2:3], seeds[2:3], **options)
    np.testing.assert_array_equal(pictures[2:3], alone)
    assert (draw_pictures(pipeline, prompts[2:3], [5], **options) != alone).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a"], "seeds": [1, 2]}, "1 prompts, 2 seeds"),
        ({"prompts": [], "seeds": []}, "0 prompts"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seeds": [-1]}, "seeds must be"),
        ({"seeds": [2**32]}, "seeds must be"),
        ({"seeds": np.array([0.5])}, "seeds must be"),
        ({"sampler": "heun"}, "'heun': it must be one of ddim, dpmsolver"),
        ({"num_steps": 0}, "num_steps is 0: it must be from 1 to 1000"),
        ({"num_steps": 1001}, "num_steps is 1001"),
        ({"adapters": {"shift": jnp.float32(np.nan)}}, "NaN or infinity"),
    ],
)
def test_bad_inputs(arguments, message):
    defaults = {"prompts": ["a"], "seeds": [1], "num_steps": 2}
    with pytest.raises(UserError, match=message):
        draw_pictures(FakePipeline(), **(defaults | arguments))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algorithm_type", "sde-dpmsolver++"),
        ("solver_order", 3),
        ("solver_type", "heun"),
        ("use_karras_sigmas", True),
        ("final_sigmas_type", "sigma_min"),
    ],
)
def test_a_solver_we_do_not_have_is_refused(key, value):
    config = {"_class_name": "DPMSolverMultistepScheduler", key: value}
    schedule = NoiseSchedule.from_config(config)
    make_sampler(UNET, schedule, sampler="ddim")
    with pytest.raises(UserError, match=key):
        make_sampler(UNET, schedule, sampler="dpmsolver++")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("use_exponential_sigmas", True),
        ("sigma_max", 80.0),
    ],
)
def test_an_euler_we_do_not_have_is_refused(key, value):
    schedule = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", key: value})
    with pytest.raises(UserError, match=key):
        make_sampler(UNET, schedule, sampler="euler")
