"""Models of a few thousand random numbers, pairs, and a config that trains in seconds."""

import dataclasses
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from safetydpo_jax import lora
from safetydpo_jax.data import Picture, write_pairs
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.models.attention import Attention
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.models.layers import Dense


def write_noise(folder, seed, size=(16, 16), pairs=24, preserved=8):
    """Pairs and preservation pictures of noise."""
    rng = np.random.default_rng(seed)

    def pictures(mark, count):
        pixels = rng.integers(0, 256, (count, *size, 3), np.uint8)
        return [Picture(f"{mark}{i}", f"{mark} word", i, p) for i, p in enumerate(pixels)]

    sides = pictures("u", pairs), pictures("s", pairs)
    write_pairs(folder, *sides, pictures("p", preserved), {})


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    """24 pairs and 8 preservation pictures of noise, 16x16."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_noise(folder, 0)
    return folder


@pytest.fixture
def config(small, pairs_folder):
    """Ten steps of the anchored recipe, not yet resolved."""
    config = common.get_config("hate")
    config.model = str(small.path)
    config.steps = 10
    config.batch_size = 8
    config.preserve_batch_size = 8
    config.lora.rank = 2
    config.pairs.path = str(pairs_folder)
    config.optimizer.warmup_steps = 2
    config.optimizer.schedule = "constant"
    config.checkpoint.every = 3
    config.log_every = 5
    config.report.enabled = False
    config.health.every = 0
    return config


class SmallUNet(nn.Module):
    """One attention layer between Dense ones: what the step needs of a UNet, compiled at once."""

    @nn.compact
    def __call__(self, latents, timesteps, prompt_embeds, *added):
        b, h, w, c = latents.shape
        time = jnp.sin(timesteps[:, None] / jnp.array([3.0, 30.0, 300.0]))
        x = Dense(16, name="proj_in")(latents.reshape(b, h * w, c))
        x = nn.silu(x + Dense(16, name="time")(time)[:, None])
        x = x + Attention(16, 2, name="attn2")(x, prompt_embeds)
        return Dense(c, name="proj_out")(nn.silu(x)).reshape(latents.shape)


@dataclasses.dataclass
class SmallPipeline:
    """What a run needs of a pipeline: 16x16 pictures, 8x8x4 latents, (5, 16) embeddings."""

    path: Path
    unet: nn.Module
    unet_params: dict
    schedule: NoiseSchedule
    vae_params: dict
    text_params: dict

    resolution = 16
    num_devices = 1
    is_sdxl = False
    vae = types.SimpleNamespace(config=types.SimpleNamespace(downscale=2))

    def encode_images(self, pictures):
        moments = np.resize(pictures / 255, (len(pictures), 8, 8, 4)).astype(np.float32)
        return moments - 0.5, moments - 5

    def encode_prompts(self, prompts, size=None):
        rows = [np.random.default_rng(len(p)).normal(size=(5, 16)) for p in prompts]
        return Conditioning(np.stack(rows).astype(np.float32))

    encode_negative = encode_prompts

    def num_cut(self, prompts):
        return 0

    zeros_for_empty = False

    def on_this_host(self, mesh, to_draw=True):
        return self

    def forget_all_but_unet(self):
        pass

    @property
    def sources(self):
        return {part.name: list(part.iterdir()) for part in self.path.iterdir()}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    unet = SmallUNet()
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 5, 16))
    return SmallPipeline(
        path=folder,
        unet=unet,
        unet_params=unet.init(jax.random.key(0), *inputs)["params"],
        schedule=NoiseSchedule(beta_schedule="scaled_linear"),
        vae_params={"x": np.zeros(1, np.float32)},
        text_params={"x": np.zeros(1, np.float32)},
    )


@pytest.fixture(scope="session")
def adapters(small):
    """Adapters that already change the output."""
    adapters = lora.init_adapters(
        jax.random.key(1), small.unet_params, rank=2, targets=("to_q", "to_k", "to_v", "to_out.0")
    )
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="session")
def batch():
    """32 rows and 32 preserve rows of random moments."""
    rng = np.random.default_rng(0)

    def moments():
        shape = (32, 8, 8, 4)
        return {
            "mean": rng.normal(size=shape).astype(np.float32),
            "logvar": np.full(shape, -4, np.float32),
        }

    def prompts():
        return Conditioning(rng.normal(size=(32, 5, 16)).astype(np.float32))

    def rows(first):
        return {
            "conditioning": prompts(),
            "row_id": np.arange(first, first + 32, dtype=np.uint32),
            "draw": np.arange(32, dtype=np.uint32) // 4,
        }

    return {
        "winner": moments(),
        "loser": moments(),
        "winner_conditioning": prompts(),
        **rows(0),
        "preserve": {
            **moments(),
            "harm": prompts(),
            **rows(1000),
        },
    }


@pytest.fixture(scope="session")
def null():
    return Conditioning(jnp.zeros((5, 16)))
