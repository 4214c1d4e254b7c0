import numpy as np
import pytest

from safetydpo_jax.emoji.backgrounds import backgrounds
from safetydpo_jax.emoji.scenes import render, sample_scene
from safetydpo_jax.models.pretrained import load_pipeline

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample_scene(rng, "held_out") for _ in range(400)]


@pytest.mark.parametrize("blur", [False, True])
def test_colours_of_scenes(scenes, blur):
    pictures = np.stack([render(scene) for scene in scenes])
    if blur:  # as soft as the embedded model draws
        pipeline = load_pipeline("emoji")
        mean, _ = pipeline.encode_images(pictures)
        pictures = np.asarray(pipeline.decode_latents(mean))
    found = backgrounds(pictures)
    hits = [names == set(scene.background) for names, scene in zip(found, scenes, strict=True)]
    assert np.mean(hits) >= 0.995


def test_noise_has_no_background():
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    assert backgrounds(noise) == [frozenset()] * 8
