"""Flax networks of Stable Diffusion, and diffusers checkpoints in and out."""
