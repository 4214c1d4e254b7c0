"""PyTorch's own diffusers pipeline in the place of ours, from the same latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from safetydpo_jax.diffusion.samplers import initial_latents


def torch_drawer(pipeline: Any, lora: Path | None = None) -> Callable[..., np.ndarray]:
    """A stand-in for `samplers.draw_pictures` that is diffusers, with an exported LoRA if given."""
    import diffusers
    import torch

    torch_pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline.path)
    torch_pipeline.to(torch.float32)  # transformers keeps the file's half precision
    settings = torch_pipeline.scheduler.config
    schedulers = {
        "ddim": diffusers.DDIMScheduler.from_config(settings),
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler.from_config(settings),
        "euler": diffusers.EulerDiscreteScheduler.from_config(settings),
    }
    if lora is not None:
        torch_pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    torch_pipeline.set_progress_bar_config(disable=True)

    def draw(
        _: Any, prompts: list[str], seeds: np.ndarray, *, num_steps: int, guidance_scale: float,
        sampler: str = "ddim", **__: Any,
    ) -> np.ndarray:  # fmt: skip
        torch_pipeline.scheduler = schedulers[sampler]
        noise = np.asarray(initial_latents(seeds, pipeline.latent_shape)).transpose(0, 3, 1, 2)
        pictures = torch_pipeline(
            prompts,
            latents=torch.from_numpy(noise.copy()),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            output_type="np",
        ).images
        return np.round(pictures * 255).astype(np.uint8)

    return draw
