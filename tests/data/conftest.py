"""A model that draws at once, prompts and a judge to go with it, and configs."""

import contextlib
import dataclasses
import hashlib
import json
import types
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from safetydpo_jax.data import PairSource, Picture, encode, write_pairs
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.models.conditioning import Conditioning

PARTS = ("unet", "vae", "text_encoder", "tokenizer")


class TinyUNet:
    """Adds the prompt's mean to the noise it is given."""

    def apply(self, variables, latents, timesteps, prompt_embeds, *added):
        return latents + jnp.mean(prompt_embeds, axis=(1, 2))[:, None, None, None]


UNET = TinyUNet()  # one for all tests, so that its sampler is compiled once


@dataclasses.dataclass
class TinyPipeline:
    """What the data stage asks of a pipeline: 16x16 pictures, 4x4x3 latents, (5, 6) embeddings."""

    path: Path
    unet: TinyUNet = UNET
    unet_params: dict = dataclasses.field(default_factory=dict)
    vae_params: dict = dataclasses.field(default_factory=lambda: {"weight": np.ones(1, np.float32)})
    text_params: dict = dataclasses.field(default_factory=lambda: {"weight": np.ones(1, "f4")})
    latent_shape = (4, 4, 3)
    resolution = 16
    mesh, num_devices = None, 1
    vae = types.SimpleNamespace(config=types.SimpleNamespace(downscale=4))
    schedule = NoiseSchedule.from_config(
        {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
        | {"beta_schedule": "linear", "prediction_type": "epsilon", "set_alpha_to_one": True}
        | {"timestep_spacing": "leading", "steps_offset": 0, "clip_sample": False}
    )

    def encode_prompts(self, prompts, size=None):
        seeds = [list(hashlib.sha256(prompt.encode()).digest()) for prompt in prompts]
        states = [np.random.default_rng(seed).normal(size=(5, 6)) for seed in seeds]
        return Conditioning(np.stack(states).astype(np.float32))

    encode_negative = encode_prompts

    def num_cut(self, prompts):
        return sum(len(prompt.split()) > 20 for prompt in prompts)

    zeros_for_empty = False

    @property
    def sources(self):
        return {part.name: list(part.iterdir()) for part in self.path.iterdir()}

    def encode_images(self, pictures):
        small = pictures[:, ::4, ::4].astype(np.float32) / 127.5 - 1
        return small, small * 0.1 - 5

    def decode_latents(self, latents):
        pixels = np.asarray(jnp.tanh(latents) * 127 + 128).astype(np.uint8)
        return pixels.repeat(4, axis=1).repeat(4, axis=2)


@dataclasses.dataclass(frozen=True)
class TinyPrompt:
    id: str
    text: str


def tiny_judge(unsafe, safe, pairs):
    """Drops every fourth pair."""
    assert unsafe.shape == safe.shape == (len(pairs), 16, 16, 3)
    return ["every fourth" if int(harm.id[1:]) % 4 == 3 else "" for harm, _ in pairs]


def tiny_source(judge=tiny_judge):
    return PairSource(
        name="tiny",
        pairs=lambda count, seed: [
            (TinyPrompt(f"h{i}", f"harm {i} {seed}"), TinyPrompt(f"s{i}", f"safe {i} {seed}"))
            for i in range(count)
        ],
        preserve=lambda count, seed: [TinyPrompt(f"p{i}", f"other {i}") for i in range(count)],
        judge=judge,
    )


def tiny_config():
    return ml_collections.ConfigDict(
        {
            "base": "emoji",
            "category": "hate",
            "model": "tiny",
            "dtype": "float32",
            "seed": 7,
            "rows": "both",
            "mix": (),
            "batch_size": 4,
            "accumulation": 1,
            "preserve_batch_size": 3,
            "pairs": {
                "path": "",
                "num_pairs": 10,
                "preserve_count": 8,
                "seed": 5,
            },
            "drawing": {
                "sampler": "ddim",
                "num_steps": 2,
                "guidance_scale": 2.0,
                "batch_size": 8,
                "matmul_precision": None,
            },
            "cache": {"dtype": "float32", "flip": False, "resolution": 0, "path": ""},
        }
    )


def make_checkpoint(folder):
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"part": part}))
    return TinyPipeline(folder)


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture
def source():
    return tiny_source()


@pytest.fixture
def pipeline(tmp_path):
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def silent():
    return lambda message: None


@pytest.fixture
def write(tmp_path):
    """Writes a pair set of random pictures to tmp_path/run/pairs."""

    def pictures(count, mark, size=16):
        rng = np.random.default_rng(ord(mark))
        return [
            Picture(
                f"{mark}{i}", f"words {mark}{i}", i, rng.integers(0, 256, (size, size, 3), np.uint8)
            )
            for i in range(count)
        ]

    def write(num_pairs=5, num_preserve=3, mark="u", last_size=16):
        folder = tmp_path / "run" / "pairs"
        safe = pictures(num_pairs - 1, "s") + pictures(1, "z", last_size)
        write_pairs(folder, pictures(num_pairs, mark), safe, pictures(num_preserve, "p"), {})
        return folder

    return write


@contextlib.contextmanager
def killed_at_the_fourth_shard():
    """Whoever encodes within is killed when three shards are written."""
    write_shard, written = encode._write_shard, []

    def killed(file, encoded, dtype):
        if len(written) == 3:
            raise KeyboardInterrupt
        write_shard(file, encoded, dtype)
        written.append(file.name)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(encode, "_write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            yield
