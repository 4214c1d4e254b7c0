"""A small nonlinear denoiser, the same in JAX and in PyTorch, NHWC in both."""

import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
MIX = (RNG.normal(size=(4, 4)) / 2).astype(np.float32)
READ = (RNG.normal(size=(6, 4)) / 2).astype(np.float32)
SHAPE = (5, 5, 4)
EMBEDS = RNG.normal(size=(3, 2, 6)).astype(np.float32)
NEGATIVE = RNG.normal(size=(3, 2, 6)).astype(np.float32)
LATENTS = RNG.normal(size=(3, *SHAPE)).astype(np.float32)


class FakeUNet:
    """`apply` as the real UNet has it; "params" scales the answer, "lora" shifts it."""

    def apply(self, variables, latents, timesteps, prompt_embeds, *added):
        when = jnp.sin(timesteps / 200)[:, None, None, None]
        text = (prompt_embeds.mean(1) @ READ)[:, None, None, :]
        answer = jnp.tanh(latents @ MIX + 0.3 * jnp.roll(latents, 1, 1) + when + text)
        return variables["params"]["gain"] * answer + variables.get("lora", {"shift": 0.0})["shift"]


def torch_unet(latents, timestep, prompt_embeds):
    """The same denoiser in PyTorch, with gain 1; `timestep` is one number."""
    import torch

    when = torch.sin(torch.as_tensor(timestep, dtype=torch.float32) / 200)
    text = (prompt_embeds.mean(1) @ torch.from_numpy(READ))[:, None, None, :]
    mixed = latents @ torch.from_numpy(MIX) + 0.3 * torch.roll(latents, 1, 1)
    return torch.tanh(mixed + when + text)
