"""The noise schedule against PyTorch diffusers, and what it refuses."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.diffusion import NoiseSchedule
from safetydpo_jax.errors import UserError

# diffusers' DPM-Solver hands NumPy 2 a torch tensor in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

X0, NOISE = np.random.default_rng(0).normal(size=(2, 3, 5, 5, 4)).astype(np.float32)
T = np.array([0, 400, 998])


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", None])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_diffusers(beta_schedule, prediction_type, zero_snr):
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    config = {
        "clip_sample": False,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
    }
    if beta_schedule is None:
        config["trained_betas"] = np.linspace(0.001, 0.02, 1000).tolist()
    else:
        config["beta_schedule"] = beta_schedule
    theirs, ours = DDIMScheduler.from_config(config), NoiseSchedule.from_config(config)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-9)

    x0, noise, t = (torch.from_numpy(x) for x in (X0, NOISE, T))
    inputs = jnp.asarray(X0), jnp.asarray(NOISE), jnp.asarray(T)
    x_t = ours.add_noise(*inputs)
    # Their tables are float32, ours are float64 until the end.
    np.testing.assert_allclose(x_t, theirs.add_noise(x0, noise, t), atol=5e-5)
    target = ours.target(*inputs)
    wanted = noise if prediction_type == "epsilon" else theirs.get_velocity(x0, noise, t)
    np.testing.assert_allclose(target, wanted, atol=5e-5)
    clean, predicted_noise = ours.to_x0_and_noise(target, x_t, inputs[2])
    alpha = np.sqrt(ours.alphas_cumprod[T]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(clean * alpha, X0 * alpha, atol=1e-5)
    np.testing.assert_allclose(predicted_noise, NOISE, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_equal_diffusers_for_any_number_of_steps(spacing, sampler):
    pytest.importorskip("torch")
    import diffusers

    classes = {
        "ddim": "DDIMScheduler",
        "dpmsolver++": "DPMSolverMultistepScheduler",
        "euler": "EulerDiscreteScheduler",
    }
    config = {"clip_sample": False, "timestep_spacing": spacing, "steps_offset": 1}
    theirs = getattr(diffusers, classes[sampler]).from_config(config)
    ours = NoiseSchedule.from_config(config)
    for num_steps in itertools.chain(range(1, 130), range(130, 999, 31)):
        theirs.set_timesteps(num_steps)
        # For some counts diffusers' trailing ends with a step too many, at t = -1.
        wanted = theirs.timesteps[:num_steps]
        ours_rounded = ours.timesteps(num_steps, sampler).astype(np.float32)
        np.testing.assert_array_equal(ours_rounded, wanted)


def test_zero_terminal_snr_is_exactly_zero():
    schedule = NoiseSchedule(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert schedule.alphas_cumprod[-1] == 0
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    pure_noise = schedule.add_noise(jnp.asarray(X0), jnp.asarray(NOISE), jnp.array([999] * 3))
    np.testing.assert_array_equal(pure_noise, NOISE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatch"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample': it must be one of epsilon"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"clip_sample": True}, '"clip_sample": false'),
        ({"clip_sample": None, "thresholding": True}, '"thresholding": false'),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_refused_configs(config, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule.from_config({"clip_sample": False} | config)


def test_absent_clip_sample_means_clipping_for_ddim_alone():
    with pytest.raises(UserError, match="clips its samples"):
        NoiseSchedule.from_config({"_class_name": "DDIMScheduler"})
    NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler"})


@pytest.mark.parametrize(
    ("num_steps", "sampler", "message"),
    [
        (0, "ddim", "num_steps is 0"),
        (-3, "ddim", "num_steps is -3"),
        (1001, "ddim", "num_steps is 1001"),
        (1000, "ddim", "repeat or pass the 1000 timesteps"),
        (1000, "dpmsolver++", "repeat or pass the 1000 timesteps"),
        (10, "heun", "sampler is 'heun'"),
    ],
)
def test_refused_steps(num_steps, sampler, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(steps_offset=1).timesteps(num_steps, sampler)
