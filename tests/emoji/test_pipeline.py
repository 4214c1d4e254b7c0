"""The shipped base model: it draws what it is asked for, here and in PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.torch_drawer import torch_drawer
from safetydpo_jax.diffusion import draw_pictures
from safetydpo_jax.emoji import scenes
from safetydpo_jax.emoji.detector import Detector
from safetydpo_jax.emoji.prompts import safe_prompts
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.pretrain.autoencoder import psnr

pytestmark = pytest.mark.usefixtures("optimised")

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "emoji_base.json"


@pytest.fixture(scope="module")
def emoji():
    return load_pipeline("emoji")


def test_it_is_small(emoji):
    files = list(emoji.path.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 25e6


def test_the_autoencoder_is_faithful(emoji):
    rng = np.random.default_rng(30)
    pictures = np.stack([scenes.render(scenes.sample_scene(rng, "held_out")) for _ in range(64)])
    mean, logvar = emoji.encode_images(pictures)
    assert psnr(pictures, emoji.decode_latents(mean)).mean() >= 29
    spread = np.sqrt(mean.var() + np.exp(logvar).mean())
    assert spread == pytest.approx(1, abs=0.05)  # what the noise schedule expects


def test_held_out_prompts_are_drawn(emoji):
    records = [r for r in safe_prompts(120, 30, "test") if len(r.concepts) == 1][:24]
    pictures = draw_pictures(
        emoji,
        [record.text for record in records],
        np.arange(len(records)),
        num_steps=12,
        guidance_scale=4.0,
        batch_size=24,
        matmul_precision="bfloat16",
    )
    found = Detector.load().names(pictures)
    hits = [record.target in names for record, names in zip(records, found, strict=True)]
    assert np.mean(hits) >= 0.85


def test_pytorch_draws_the_same(emoji):
    pytest.importorskip("torch")
    prompts, seeds = [record.text for record in safe_prompts(4, 31, "test")], np.arange(4)
    options = {"num_steps": 8, "guidance_scale": 4.0}
    wanted = torch_drawer(emoji)(emoji, prompts, seeds, **options)
    pictures = draw_pictures(emoji, prompts, seeds, **options)
    assert pictures.std() > 20
    assert np.abs(pictures.astype(int) - wanted).mean() < 1


def test_recorded_figures():
    measured = json.loads(RESULT.read_text())
    assert measured["autoencoder_psnr"] >= 30
    assert measured["torch"]["mean_levels"] <= 1
    assert {group["pictures"] for group in measured["groups"].values()} == {500}
    for name, group in measured["groups"].items():
        assert group["found"] >= (0.95 if name.endswith("one") else 0.80)
