"""The networks of a checkpoint, ready to apply to prompts, pictures and latents."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from safetydpo_jax import sharding
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.autoencoder import to_pixels
from safetydpo_jax.models.conditioning import Conditioning

PROMPTS_AT_ONCE = 64
_PIXELS_AT_ONCE = 2 * 1024 * 1024
# Folders of a checkpoint, each encoder with its tokenizer; SDXL has both, others the first.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclasses.dataclass(eq=False)
class Pipeline:
    """The networks of a checkpoint with their parameters, its tokenizers and its noise schedule.

    Attributes:
      networks: "unet", "vae", "text_encoder" and, in SDXL, "text_encoder_2".
      params: their parameters, by the same names.
      tokenizers: one a text encoder, in their order.
      schedule: the noise schedule.
      configs: the parsed config files by folder ("unet", ..., "scheduler"), and "model_index".
      path: the folder or file it was loaded from, or None.
      sources: the files that each network, tokenizer and the "scheduler" were read from.
      mesh: of the devices that batches are spread over, a batch's size on each, or None; see
        `spread`.
    """

    networks: dict[str, Any]
    params: dict[str, Any]
    tokenizers: Sequence[Any]
    schedule: NoiseSchedule
    configs: dict[str, dict[str, Any]]
    path: pathlib.Path | None = None
    sources: Mapping[str, Sequence[pathlib.Path]] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None

    def spread(self, devices: Sequence[Any]) -> "Pipeline":
        """The same with its parameters on each of these devices, which share its batches."""
        if len(devices) == 1:
            return self
        mesh = sharding.make_mesh(devices=devices)
        params = jax.device_put(self.params, sharding.replicated(mesh))
        return dataclasses.replace(self, params=params, mesh=mesh)

    def on_this_host(self, mesh: Mesh, *, to_draw: bool = True) -> "Pipeline":
        """The same on each of this process's devices, to draw and to encode with.

        Args:
          mesh: on which the UNet's parameters are, in any layout; of a job's processes all are to
            ask. What is on every device already is not copied.
          to_draw: the UNet, too, which is large where the mesh splits it; else it stays as it is.
        """
        if mesh.size == 1:
            return self
        local = sharding.local_mesh(mesh)
        params = jax.device_put(
            {name: tree for name, tree in self.params.items() if name != "unet"},
            sharding.replicated(local),
        )
        unet = self.unet_params
        params["unet"] = sharding.on_this_host(unet, mesh) if to_draw else unet
        return dataclasses.replace(self, params=params, mesh=local)

    def forget_all_but_unet(self) -> None:
        """Frees the other networks' parameters."""
        for name in set(self.params) - {"unet"}:
            del self.params[name]

    @property
    def num_devices(self) -> int:
        """How many devices share a batch."""
        return self.mesh.size if self.mesh else 1

    @property
    def unet(self) -> Any:
        """The UNet, a `models.unet.UNet2DConditionModel`."""
        return self.networks["unet"]

    @property
    def unet_params(self) -> dict[str, Any]:
        """The UNet's parameters."""
        return self.params["unet"]

    @property
    def vae(self) -> Any:
        """The autoencoder, a `models.autoencoder.AutoencoderKL`."""
        return self.networks["vae"]

    @property
    def vae_params(self) -> dict[str, Any]:
        """The autoencoder's parameters."""
        return self.params["vae"]

    @property
    def text_params(self) -> dict[str, Any]:
        """The text encoders' parameters, by the name of their folder."""
        return {name: self.params[name] for name in TOKENIZERS if name in self.params}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the latents that the UNet was trained on."""
        size = self.unet.config.sample_size
        return (size, size, self.unet.config.in_channels)

    @property
    def resolution(self) -> int:
        """Pixels along one side of the pictures that the UNet was trained on."""
        return self.unet.config.sample_size * self.vae.config.downscale

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet wants pooled text and sizes beside the prompt's states."""
        return self.unet.config.addition_time_embed_dim is not None

    @functools.cached_property
    def encode_tokens(self) -> Callable[..., Conditioning]:
        """Compiled `(text_params, (ids, a list of (n, t); sizes (n, 6))) -> Conditioning`."""
        encoders = [self.networks[name] for name in self.text_params]

        def encode(params: Any, inputs: tuple[Sequence[Array], Array]) -> Conditioning:
            ids, sizes = inputs
            outputs: list[Any] = [
                encoder.apply({"params": p}, i)
                for encoder, p, i in zip(encoders, params.values(), ids, strict=True)
            ]
            if not self.is_sdxl:
                return Conditioning(outputs[0].last_hidden_state)
            states = [output.hidden_states[-2] for output in outputs]
            return Conditioning(jnp.concatenate(states, -1), outputs[-1].pooler_output, sizes)

        return sharding.spread(encode, self.mesh, False, True)

    @functools.cached_property
    def encode(self) -> Callable[..., tuple[Array, Array]]:
        """Compiled `(vae_params, uint8 (n, h, w, 3)) -> (mean, logvar)`; see `encode_images`."""

        def encode(params: Any, pictures: Array) -> tuple[Array, Array]:
            pixels = to_pixels(pictures)
            mean, logvar = self.vae.apply({"params": params}, pixels, method="encode")
            scale = self.vae.config.scaling_factor
            return mean * scale, logvar + 2.0 * np.log(scale)

        return sharding.spread(encode, self.mesh, False, True)

    @functools.cached_property
    def decode(self) -> Callable[..., Array]:
        """Compiled `(vae_params, (n, h, w, c)) -> uint8 pictures`; see `decode_latents`."""

        def decode(params: Any, latents: Array) -> Array:
            latents = latents / self.vae.config.scaling_factor
            pixels: Any = self.vae.apply({"params": params}, latents, method="decode")
            return jnp.round(jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)

        return sharding.spread(decode, self.mesh, False, True)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        batch_size: int = PROMPTS_AT_ONCE,
    ) -> Conditioning:
        """What prompts tell the UNet, in NumPy; they are padded or cut to the tokenizer's length.

        Args:
          prompts: the texts.
          size: height and width in pixels that SDXL is told a picture has, uncropped; by default
            those that the UNet was trained on.
          batch_size: how many a device encodes at a time.
        """
        ids = [tokenize(tokenizer, prompts) for tokenizer in self.tokenizers]
        height, width = size or (self.resolution, self.resolution)
        row = np.array([height, width, 0, 0, height, width], np.float32)
        inputs = ids, np.tile(row, (len(prompts), 1))
        encode = functools.partial(self.encode_tokens, self.text_params)
        return self._in_batches(encode, inputs, batch_size)

    def num_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than a text encoder reads."""
        ids = [
            t(list(prompts), truncation=True, max_length=t.model_max_length + 1)["input_ids"]
            for t in self.tokenizers
        ]
        limits = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        return sum(
            any(len(row) > limit for row, limit in zip(rows, limits, strict=True))
            for rows in zip(*ids, strict=True)
        )

    @property
    def zeros_for_empty(self) -> bool:
        """Whether no prompt is told as zeros (SDXL, if model_index.json says so), not as ""."""
        index = self.configs.get("model_index", {})
        return self.is_sdxl and bool(index.get("force_zeros_for_empty_prompt", True))

    def encode_negative(
        self, prompts: Sequence[str], *, size: tuple[int, int] | None = None
    ) -> Conditioning:
        """What guidance is to steer away from, as in diffusers; "" is nothing in particular."""
        found = self.encode_prompts(prompts, size=size)
        if not self.zeros_for_empty:
            return found
        said = np.array([bool(prompt) for prompt in prompts])
        return found._replace(
            prompt_embeds=found.prompt_embeds * said[:, None, None],
            text_embeds=found.text_embeds * said[:, None],
        )

    def encode_images(
        self, pictures: UInt8[np.ndarray, "n h w 3"], *, batch_size: int | None = None
    ) -> tuple[Float[np.ndarray, "n h2 w2 c"], Float[np.ndarray, "n h2 w2 c"]]:
        """Mean and log-variance of the pictures' latents, scaled by `scaling_factor`."""
        batch_size = batch_size or pictures_at_once(pictures.shape[1] * pictures.shape[2])
        encode = functools.partial(self.encode, self.vae_params)
        return self._in_batches(encode, pictures, batch_size)

    def decode_latents(
        self, latents: Float[np.ndarray | Array, "n h w c"], *, batch_size: int | None = None
    ) -> UInt8[np.ndarray, "n h2 w2 3"]:
        """Pictures of scaled latents."""
        pixels = latents.shape[1] * latents.shape[2] * self.vae.config.downscale**2
        batch_size = batch_size or pictures_at_once(pixels)
        decode = functools.partial(self.decode, self.vae_params)
        return self._in_batches(decode, np.asarray(latents), batch_size)

    def _in_batches(self, fn: Callable[..., Any], inputs: Any, batch_size: int) -> Any:
        """Applies `fn` to slices of one size, so that one shape is compiled; joins the results.

        A device's share is as large as one device's alone would be: the results are the same.
        """
        count = len(jax.tree.leaves(inputs)[0])
        if not count:
            raise UserError("nothing to encode or decode: the list is empty")
        size = min(batch_size, count) * self.num_devices
        results = []
        for start in range(0, count, size):
            index = np.minimum(np.arange(start, start + size), count - 1)
            part = fn(jax.tree.map(lambda x, index=index: x[index], inputs))
            results.append(jax.tree.map(np.asarray, part))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Token ids of prompts, int32 (n, t), padded or cut to the tokenizer's length."""
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    )
    return np.asarray(tokens["input_ids"], np.int32)


def pictures_at_once(pixels: int) -> int:
    """Pictures in one pass of the autoencoder: at 1024 px one takes gigabytes, in float32."""
    return max(1, min(32, _PIXELS_AT_ONCE // pixels))
