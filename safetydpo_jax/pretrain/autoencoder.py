"""Stage two: the KL autoencoder, and the latents of the whole set."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.autoencoder import AutoencoderKL, to_pixels
from safetydpo_jax.models.pipeline import pictures_at_once
from safetydpo_jax.pace import Pace
from safetydpo_jax.pretrain.fit import fit, quiet_residuals

_VALIDATION = 256  # last pictures of the set, kept from training


def psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each uint8 picture (n, h, w, 3) against the other's, dB."""
    error = np.square(pictures.astype(np.float64) - others.astype(np.float64)).mean((1, 2, 3))
    return 10.0 * np.log10(255.0**2 / np.maximum(error, 1e-10))


def train_autoencoder(
    config: Any, vae: AutoencoderKL, pictures: np.ndarray, workdir: pathlib.Path, seed: int
) -> Any:
    """Trains the autoencoder on pictures (n, h, w, 3) uint8; returns its parameters.

    The loss is squared error, a share of absolute error for sharp edges, and a small KL term, which
    keeps latents smooth and of bounded scale.
    """
    train = len(pictures) - _VALIDATION
    if train < 1:
        raise UserError(
            f"{len(pictures)} pictures: give more than {_VALIDATION}, which are for validation"
        )
    example = jnp.zeros((1, *pictures.shape[1:]))
    params: Any = jax.jit(vae.init)(jax.random.key(seed), example)["params"]
    params = quiet_residuals(params, ("conv2", "to_out.0"))
    # Quiet latents at first: under noise of size one the decoder learns nothing for a long while.
    channels = vae.config.latent_channels
    quiet = jnp.where(jnp.arange(2 * channels) < channels, 0.0, -5.0)
    params["quant_conv"]["bias"] += quiet

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        pixels = to_pixels(batch)
        moments: Any = vae.apply({"params": params}, pixels, method="encode")
        mean, logvar = moments
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        decoded: Any = vae.apply({"params": params}, latents, method="decode")
        error = decoded - pixels
        squared, absolute = jnp.square(error).mean(), jnp.abs(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
        loss = squared + config.absolute_weight * absolute + config.kl_weight * kl
        return loss, {"psnr": 10.0 * jnp.log10(4.0 / squared), "kl": kl}

    def batches(step: int) -> np.ndarray:
        rows = np.random.default_rng((seed, step)).integers(0, train, config.batch_size)
        return pictures[np.sort(rows)]

    @jax.jit
    def reconstruct(params: Any, batch: jax.Array) -> jax.Array:
        pixels: Any = vae.apply({"params": params}, to_pixels(batch))
        return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0.0, 255.0)).astype(jnp.uint8)

    def evaluate(params: Any, step: int) -> dict[str, float]:
        held_out = np.asarray(pictures[-_VALIDATION:])
        parts = [reconstruct(params, part) for part in np.array_split(held_out, 8)]
        decibels = psnr(held_out, np.concatenate(parts))
        return {"validation_psnr": float(decibels.mean())}

    return fit(
        "autoencoder", config, params, loss_fn, batches, workdir, seed=seed, evaluate=evaluate
    )


def encode_pictures(
    config: Any, vae: AutoencoderKL, params: Any, pictures: np.ndarray, workdir: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, float]:
    """Moments of every picture's latent, unscaled, and the scaling factor 1 / std(latents).

    Returns:
      mean and standard deviation (n, h, w, c) float16, memory-mapped, and the factor.
    """
    folder = pathlib.Path(workdir) / "latents"
    done = folder / "done.json"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)

        @jax.jit
        def encode(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
            moments: Any = vae.apply({"params": params}, to_pixels(batch), method="encode")
            mean, logvar = moments
            return mean.astype(jnp.float16), jnp.exp(0.5 * logvar).astype(jnp.float16)

        side = pictures.shape[1] // vae.config.downscale
        shape = (len(pictures), side, side, vae.config.latent_channels)
        mean, std = (
            np.lib.format.open_memmap(folder / f"{n}.npy", mode="w+", dtype=np.float16, shape=shape)
            for n in ("mean", "std")
        )
        size, pace = pictures_at_once(pictures.shape[1] * pictures.shape[2]), Pace(len(pictures))
        with jax.default_matmul_precision(config.matmul_precision):
            for i in range(0, len(pictures), size):
                mean[i : i + size], std[i : i + size] = encode(params, pictures[i : i + size])
                if pace.due(encoded := min(i + size, len(pictures))):
                    print(
                        f"latents: {encoded}/{len(pictures)}, {pace.rate(encoded):.0f} pictures/s, "
                        f"{pace.left(encoded):.0f} s left",
                        flush=True,
                    )
        sample = mean[:: max(1, len(mean) // 4096)].astype(np.float64)
        noise = std[:: max(1, len(std) // 4096)].astype(np.float64)
        spread = float(np.sqrt(sample.var() + np.square(noise).mean()))
        mean.flush()
        std.flush()
        storage.write_file(done, json.dumps({"scaling_factor": round(1.0 / spread, 5)}).encode())
    arrays = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("mean", "std"))
    return *arrays, float(json.loads(done.read_text())["scaling_factor"])
