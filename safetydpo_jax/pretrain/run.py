"""All stages of pretraining, in order; a stage whose result is in the workdir is not run again."""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from safetydpo_jax.errors import UserError
from safetydpo_jax.evaluate.detections import fingerprint
from safetydpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from safetydpo_jax.models.checkpoint import build_networks
from safetydpo_jax.models.pipeline import Pipeline, tokenize
from safetydpo_jax.models.pretrained import load_pipeline, save_pipeline
from safetydpo_jax.pretrain.autoencoder import encode_pictures, train_autoencoder
from safetydpo_jax.pretrain.denoiser import train_denoiser
from safetydpo_jax.pretrain.fit import make_optimizer
from safetydpo_jax.pretrain.pictures import prepare_pictures
from safetydpo_jax.pretrain.tokenizer import train_tokenizer
from safetydpo_jax.storage import check_same, write_file
from safetydpo_jax.train.workdir import lock_workdir

# Settings that may change when a run goes on: how long it trains, and what it tells.
_FREE = ("steps", "decay_steps", "log_every", "save_every")


def run(config: Any, workdir: str | pathlib.Path) -> pathlib.Path:
    """Trains a base model and writes workdir/pipeline, a diffusers checkpoint in float16.

    Args:
      config: as configs/emoji_base.py describes.
      workdir: every stage's results and checkpoints; a killed run goes on from them.

    Returns:
      The pipeline's folder.

    Raises:
      UserError: a stage in the workdir was made with other settings, or another run is using it.
      SystemExit: stopped by SIGTERM or Ctrl-C during training; the state is saved.
    """
    if "denoiser_training" not in config:
        raise UserError(
            "this config is of no base model: give configs/emoji_base.py or one like it"
        )
    workdir = pathlib.Path(workdir)
    with lock_workdir(workdir):
        return _run(config, workdir)


def _run(config: Any, workdir: pathlib.Path) -> pathlib.Path:
    started = time.perf_counter()
    parts = set(config.init.parts) if config.init.path else set()
    if unknown := parts - {"vae", "text_encoder", "unet"}:
        raise UserError(f"config.init.parts has {', '.join(sorted(unknown))}: no part of a model")
    for training in (config.autoencoder_training, config.denoiser_training):
        make_optimizer(training)  # refuses now what it would refuse hours later
    base = load_pipeline(config.init.path) if parts else None
    if base is not None and base.is_sdxl:
        raise UserError(
            f"{config.init.path}: pretraining goes on from Stable Diffusion 1.x and 2.x"
        )
    if base is not None and "vae" in parts:
        step = base.vae.config.downscale
    else:
        step = AutoencoderConfig.from_dict(_plain(config.vae)).downscale
    if config.data.resolution % step:
        raise UserError(
            f"config.data.resolution is {config.data.resolution}: it must be a multiple of {step}, "
            "the pixels to a latent"
        )
    made_from: dict[str, Any] = {"data": _plain(config.data)}
    _claim(workdir / "pictures", made_from)
    pictures, captions = prepare_pictures(config.data, workdir)
    print(f"pictures: {len(pictures)} of {config.data.resolution} px", flush=True)

    if base is not None and "text_encoder" in parts:
        [tokenizer] = base.tokenizers
    else:
        words = sorted({word for text in captions for word in text.replace(",", " ").split()})
        tokenizer = train_tokenizer(words, workdir / "tokenizer", **config.tokenizer)
    tokens = tokenize(tokenizer, captions)
    empty = tokenize(tokenizer, [""])[0]
    print(f"tokenizer: {len(tokenizer)} tokens", flush=True)

    made_from |= {"seed": config.seed, "init": _plain(config.init)}
    if base is not None and "vae" in parts:
        vae, vae_config, vae_params = base.vae, base.configs["vae"], base.vae_params
    else:
        vae_config = _plain(config.vae)
        training = config.autoencoder_training
        made_from |= {"vae": vae_config, "autoencoder_training": _plain(training)}
        _claim(workdir / "autoencoder", made_from)
        vae = AutoencoderKL(AutoencoderConfig.from_dict(vae_config))
        vae_params = train_autoencoder(training, vae, pictures, workdir, config.seed)
    # An autoencoder that was trained for longer, or lies anew at the same path, is another.
    made_from |= {"autoencoder_weights": fingerprint(vae_params)}
    _claim(workdir / "latents", made_from)
    mean, std, factor = encode_pictures(
        config.autoencoder_training, vae, vae_params, pictures, workdir
    )
    if {"vae", "unet"} <= parts:
        factor = vae.config.scaling_factor  # what that UNet was trained with

    text_config = _plain(config.text_encoder) | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.tokenizer.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    configs = {
        "unet": _plain(config.unet),
        "vae": vae_config | {"scaling_factor": factor},
        "text_encoder": text_config,
        "scheduler": _plain(config.scheduler),
    }
    start = {}
    if base is not None:
        configs |= {part: base.configs[part] for part in parts - {"vae"}}
        if "unet" in parts:  # what it predicts, and of which noise
            configs["scheduler"] = base.configs["scheduler"]
        start = {part: base.params[part] for part in parts - {"vae"}}
    side = config.data.resolution // vae.config.downscale
    configs["unet"] = configs["unet"] | {"sample_size": side}
    made_from |= {**configs, "denoiser_training": _plain(config.denoiser_training)}
    _claim(workdir / "denoiser", made_from)
    networks, schedule = build_networks(configs, str(workdir))

    def write(params: Any, name: str) -> pathlib.Path:
        pipeline = Pipeline(networks, params | {"vae": vae_params}, [tokenizer], schedule, configs)
        save_pipeline(pipeline, workdir / name, np.float16)
        return workdir / name

    def save_preview(params: Any, step: int) -> dict[str, float]:
        write(params, "preview")
        return {}

    params = train_denoiser(
        config.denoiser_training,
        networks["unet"],
        networks["text_encoder"],
        schedule,
        (mean, std),
        factor,
        tokens,
        empty,
        workdir,
        seed=config.seed,
        start=start,
        evaluate=save_preview,
    )
    folder = write(params, "pipeline")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    minutes = (time.perf_counter() - started) / 60
    print(f"done in {minutes:.1f} min: {folder} ({size:.1f} MB of weights)", flush=True)
    return folder


def _claim(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Notes what a stage is made from, or compares it with what was noted before.

    Raises:
      UserError: the stage was begun with other settings.
    """
    now = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in settings.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        if key not in _FREE
    }
    file = folder / "settings.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(now, indent=1).encode())
        return
    check_same(
        folder,
        json.loads(file.read_text()),
        now,
        "choose another --workdir, or delete that folder and those of the stages after it",
    )


def _plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as JSON has it: lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))
