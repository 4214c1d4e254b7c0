"""Safety alignment of text-to-image diffusion models with Diffusion-DPO, in JAX."""

__version__ = "0.1.0"
