"""Stable Diffusion at full size against PyTorch's diffusers: the same answers, time and memory.

    python benchmarks/true_size.py                          # SD 1.5, 2.1 base, 2.1 and SDXL
    python benchmarks/true_size.py --models sd15 --folder /scratch/true_size

Real checkpoints cannot be shipped, so PyTorch writes one of every published config.json with random
weights, in the layout of diffusers, once. Both frameworks load it, one after the other in a process
of its own, and compute the same from the same numbers, in float32: text states, one UNet forward
pass, the autoencoder both ways, and (not SDXL) four guided steps of each sampler. SDXL needs 24 GB
of memory with nothing beside it; all need 24 GB of disk. Writes
benchmarks/results/true_size/MODEL.json; a model whose file is there is not measured again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and tests

from benchmarks.machine import machine
from benchmarks.memory import Memory
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "true_size"
PUBLISHED = ROOT / "safetydpo_jax" / "models" / "published"
SIDES = {"sd15": 512, "sd21-base": 512, "sd21-768": 768, "sdxl": 1024}
BOUND = 1e-3
PROMPTS, NEGATIVE, STEPS, GUIDANCE = ["a red bell on a table"], "a drum", 4, 5.0
SAMPLERS = ("ddim", "dpmsolver++", "euler")
# Calls for the time after the first one, which compiles; a sampler has its first alone.
REPEATS = {"unet": 3, "text": 1, "vae_encode": 1, "vae_decode": 1}


def main(argv: list[str] | None = None) -> None:
    """Writes, runs and compares; exits with an error if any answer differs by more than BOUND."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "true_size")
    parser.add_argument("--stage", choices=STAGES, help="one stage in this process, for one model")
    args = parser.parse_args(argv)
    if args.stage:
        STAGES[args.stage](args.models[0], args.folder / args.models[0])
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    worst = {}
    for model in args.models:
        if not (file := RESULTS / f"{model}.json").is_file():
            write_file(file, compare(model, args.folder / model))
        parts = json.loads(file.read_text())["parts"]
        # NumPy's maximum is NaN if any is.
        worst[model] = float(np.max([part["relative_error"] for part in parts.values()]))
    print(f"written: {RESULTS}")
    if not all(error <= BOUND for error in worst.values()):  # NaN, too, is not
        raise UserError(f"relative errors above {BOUND}: {worst}")


def compare(model: str, folder: Path) -> bytes:
    """All stages of a model; its result, JSON."""
    for stage in STAGES:
        if stage != "write" or not (folder / "model_index.json").is_file():
            command = [sys.executable, __file__, "--models", model, "--folder", str(folder.parent)]
            subprocess.run([*command, "--stage", stage], check=True)
    told = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in ("torch", "jax")}
    arrays = {stage: np.load(folder / f"{stage}.npz") for stage in ("torch", "jax")}
    result: dict[str, Any] = {
        "model": model,
        "pixels": SIDES[model],
        "machine": machine(),
        "versions": {stage: told[stage]["version"] for stage in told},
        "load": {stage: told[stage]["load"] for stage in told},
        "parts": {},
    }
    for name in arrays["torch"].files:
        wanted, got = arrays["torch"][name], arrays["jax"][name]
        error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        part = {stage: told[stage]["parts"][name] for stage in told}
        result["parts"][name] = {"relative_error": float(f"{error:.2g}"), **part}
        seconds = " against ".join(f"{part[x]['seconds']:.2f} s" for x in ("jax", "torch"))
        print(f"{model} {name}: relative error {error:.1e}, {seconds}", flush=True)
    return (json.dumps(result, indent=1) + "\n").encode()


class Parts:
    """What one framework computes, with seconds and memory; saved beside the checkpoint."""

    def __init__(self, stage: str, version: str) -> None:
        self.stage, self.arrays = stage, {}
        self.told: dict[str, Any] = {"version": version, "parts": {}}

    def loaded(self, memory: Memory, seconds: float) -> None:
        """Notes what loading took."""
        self.told["load"] = {
            "seconds": round(seconds, 1),
            "anonymous_mb_before": memory.before,
            "peak_anonymous_mb": memory.anonymous,
            "peak_resident_mb": memory.resident,
        }

    def run(self, name: str, part: Callable[[], Any]) -> None:
        """Runs a part, which returns an array of PyTorch's layout, once and then for the time."""
        with Memory() as memory:
            started = time.perf_counter()
            self.arrays[name] = np.asarray(part(), np.float32)
            first, seconds = time.perf_counter() - started, []
            for _ in range(REPEATS.get(name, 0)):
                started = time.perf_counter()
                part()
                seconds.append(time.perf_counter() - started)
        self.told["parts"][name] = {
            "seconds": round(min(seconds, default=first), 2),
            "first_seconds": round(first, 2),
            "peak_resident_mb": memory.resident,
        }
        print(
            f"{self.stage} {name}: {min(seconds, default=first):.2f} s, {memory.resident} MB",
            flush=True,
        )

    def save(self, folder: Path) -> None:
        """Writes STAGE.npz and STAGE.json."""
        np.savez(folder / f"{self.stage}.npz", **self.arrays)
        write_file(folder / f"{self.stage}.json", json.dumps(self.told).encode())


def inputs(model: str, unet: dict[str, Any]) -> dict[str, np.ndarray]:
    """The numbers that both frameworks get, NHWC."""
    rng, side = np.random.default_rng(0), SIDES[model] // 8
    given = {
        "latents": rng.normal(size=(1, side, side, 4)),
        "prompt_embeds": rng.normal(size=(1, 77, unet["cross_attention_dim"])),
        "picture": rng.uniform(-1, 1, size=(1, 8 * side, 8 * side, 3)),
    }
    if model == "sdxl":
        given["text_embeds"] = rng.normal(size=(1, 1280))
        given["time_ids"] = np.array([[1024, 1024, 0, 0, 1024, 1024]])
    return {name: x.astype(np.float32) for name, x in given.items()}


def write(model: str, folder: Path) -> None:
    """PyTorch's checkpoint with random weights, network by network; model_index.json comes last."""
    import shutil

    import diffusers
    import transformers

    from tests.models.torch_models import config, randomise

    index = json.loads((PUBLISHED / model / "model_index.json").read_text())
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for seed, name in enumerate(sorted(x for x in index if x != "model_index")):
        source = PUBLISHED / model / name
        if not source.is_dir():
            continue
        if name in kinds:
            network = kinds[name].from_config(config(model, name))
        elif name.startswith("text_encoder"):
            settings = config(model, name, torch_dtype="float32")
            kind = getattr(transformers, settings["architectures"][0])
            network = kind(transformers.CLIPTextConfig(**settings))
        else:
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
            continue
        randomise(network, seed).save_pretrained(folder / name, max_shard_size="4GB")
        shutil.copy(source / "config.json", folder / name / "config.json")  # as published
        print(f"{model}: {name} written", flush=True)
        del network
    write_file(folder / "model_index.json", json.dumps(index).encode())


def run_torch(model: str, folder: Path) -> None:
    """All parts in PyTorch."""
    import diffusers
    import torch

    parts = Parts("torch", f"torch {torch.__version__}, diffusers {diffusers.__version__}")
    torch.set_grad_enabled(False)
    index = json.loads((folder / "model_index.json").read_text())
    components = [name for name, what in index.items() if isinstance(what, list)]
    absent = [name for name in components if not (folder / name).is_dir()]  # filters and the like
    started = time.perf_counter()
    with Memory() as memory:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, **dict.fromkeys(absent)
        )
    parts.loaded(memory, time.perf_counter() - started)
    pipe.set_progress_bar_config(disable=True)
    given = {k: torch.from_numpy(x) for k, x in inputs(model, dict(pipe.unet.config)).items()}
    latents, picture = (given[x].permute(0, 3, 1, 2) for x in ("latents", "picture"))
    added = {k: given[k] for k in ("text_embeds", "time_ids") if k in given}

    def text() -> Any:
        embeds, _, *pooled = pipe.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return torch.cat([embeds.flatten(), *(x.flatten() for x in pooled[:1])])

    def unet() -> Any:
        embeds = given["prompt_embeds"]
        return pipe.unet(latents, 500, embeds, added_cond_kwargs=added or None).sample

    def sample(kind: Any, **changes: Any) -> Any:
        pipe.scheduler = kind.from_config(settings, **changes)
        return pipe(
            PROMPTS,
            latents=latents.clone(),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            negative_prompt=[NEGATIVE],
            output_type="latent",
        ).images

    settings = json.loads((PUBLISHED / model / "scheduler/scheduler_config.json").read_text())
    parts.run("text", text)
    parts.run("unet", unet)
    parts.run("vae_encode", lambda: pipe.vae.encode(picture).latent_dist.mean)
    parts.run("vae_decode", lambda: pipe.vae.decode(latents).sample)
    if model != "sdxl":
        parts.run("ddim", lambda: sample(diffusers.DDIMScheduler, clip_sample=False))
        parts.run("dpmsolver++", lambda: sample(diffusers.DPMSolverMultistepScheduler))
        parts.run("euler", lambda: sample(diffusers.EulerDiscreteScheduler))
    parts.save(folder)


def run_jax(model: str, folder: Path) -> None:
    """All parts in JAX."""
    import jax
    import jax.numpy as jnp

    from safetydpo_jax.diffusion import make_sampler
    from safetydpo_jax.models.pretrained import load_pipeline

    parts = Parts("jax", f"jax {jax.__version__}")
    jnp.zeros(1).block_until_ready()  # the backend's own memory is none of the loading's
    started = time.perf_counter()
    with Memory() as memory:
        pipe = load_pipeline(folder, progress=print)
        jax.block_until_ready(pipe.params)
    parts.loaded(memory, time.perf_counter() - started)
    sizes = [x.nbytes for x in jax.tree.leaves(pipe.params)]
    parts.told["load"] |= {
        "parameters_mb": sum(sizes) // 10**6,
        "largest_tensor_mb": max(sizes) // 10**6,
    }
    given = inputs(model, pipe.configs["unet"])
    told = [given[x] for x in ("prompt_embeds", "text_embeds", "time_ids") if x in given]
    timesteps = np.full(1, 500)

    def nchw(x: Any) -> np.ndarray:
        return np.asarray(x).transpose(0, 3, 1, 2)

    def text() -> np.ndarray:
        states = pipe.encode_prompts(PROMPTS)
        return np.concatenate([x.ravel() for x in states[:2] if x is not None])

    vae = {
        name: jax.jit(
            lambda params, x, name=name: pipe.vae.apply({"params": params}, x, method=name)
        )
        for name in ("encode", "decode")
    }
    unet = jax.jit(pipe.unet.apply)
    parts.run("text", text)
    parts.run(
        "unet",
        lambda: nchw(unet({"params": pipe.unet_params}, given["latents"], timesteps, *told)),
    )
    parts.run("vae_encode", lambda: nchw(vae["encode"](pipe.vae_params, given["picture"])[0]))
    parts.run("vae_decode", lambda: nchw(vae["decode"](pipe.vae_params, given["latents"])))
    if model != "sdxl":
        prompt, negative = pipe.encode_prompts(PROMPTS), pipe.encode_negative([NEGATIVE])

        def sample(name: str) -> np.ndarray:
            run = make_sampler(
                pipe.unet, pipe.schedule, sampler=name, num_steps=STEPS, guidance_scale=GUIDANCE
            )
            return nchw(run(pipe.unet_params, None, given["latents"], prompt, negative))

        for name in SAMPLERS:
            parts.run(name, lambda name=name: sample(name))
    parts.save(folder)


STAGES = {"write": write, "torch": run_torch, "jax": run_jax}

if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
