"""From prompts to latents in every family, against PyTorch's pipelines, from the same noise."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

from safetydpo_jax.diffusion import initial_latents, make_sampler
from safetydpo_jax.models.pretrained import load_pipeline
from tests.models import torch_models

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS, NEGATIVE = ["A bell.", "two red bells"], "a drum"
STEPS, GUIDANCE = 20, 5.0
# Sampler -> diffusers' class; what else it is set to, as ours has no other.
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}


@pytest.fixture(scope="module", params=["sd15", "sd21-base", "sd21-768", "sdxl"])
def family(request, tmp_path_factory):
    theirs = torch_models.family_pipeline(request.param, tmp_path_factory.mktemp("tokenizers"))
    theirs.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    # As published: diffusers writes out defaults that another sampler does not have.
    name = "scheduler/scheduler_config.json"
    shutil.copy(torch_models.PUBLISHED / request.param / name, folder / name)
    return load_pipeline(folder), theirs, json.loads((folder / name).read_text())


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents(sampler, family):
    ours, theirs, settings = family
    kind, changes = SCHEDULERS[sampler]
    theirs.scheduler = kind.from_config(settings, **changes)
    noise = initial_latents([4, 9], ours.latent_shape)
    wanted = theirs(
        PROMPTS,
        latents=torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        negative_prompt=[NEGATIVE] * 2,
        output_type="latent",
    ).images
    sample = make_sampler(
        ours.unet, ours.schedule, sampler=sampler, num_steps=STEPS, guidance_scale=GUIDANCE
    )
    told = ours.encode_prompts(PROMPTS), ours.encode_negative([NEGATIVE] * 2)
    got = np.asarray(sample(ours.unet_params, None, noise, *told)).transpose(0, 3, 1, 2)
    error = np.abs(got - wanted.numpy()).max() / np.abs(wanted.numpy()).max()
    assert error <= 1e-3, f"relative error {error:.1e}"
    assert np.abs(got[0] - got[1]).max() > 0.1  # the prompts and the noise count
