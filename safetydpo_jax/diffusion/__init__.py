"""Noise schedules, prediction types and samplers."""

from safetydpo_jax.diffusion.samplers import (
    SAMPLERS,
    draw_pictures,
    initial_latents,
    iterate_pictures,
    make_sampler,
)
from safetydpo_jax.diffusion.schedule import NoiseSchedule

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "draw_pictures",
    "initial_latents",
    "iterate_pictures",
    "make_sampler",
]
