"""Pretraining of a small Stable Diffusion from pictures with captions.

Stages, each reading what the one before left in the workdir: pictures, tokenizer, autoencoder,
latents, denoiser, pipeline. `launch/pretrain.py` runs them in this order.
"""
