"""AutoencoderKL: pictures to latents and back, built from a checkpoint's vae/config.json.

Source: Rombach et al. 2022; names and arithmetic as in diffusers' `AutoencoderKL`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from safetydpo_jax.models.attention import Attention
from safetydpo_jax.models.config import check_config, check_divisible, per_block
from safetydpo_jax.models.layers import Conv, ResnetBlock, upsample_nearest
from safetydpo_jax.models.norms import GroupNorm

_EPS = 1e-6


def to_pixels(pictures: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Pictures as the autoencoder takes them: 0 .. 255 to float32 in [-1, 1]."""
    return pictures.astype(jnp.float32) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The keys of `vae/config.json` that shape the network, and the latents' scale."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str = "vae/config.json"
    ) -> "AutoencoderConfig":
        """Reads a diffusers config; UserError names a key that is missing or not supported."""
        config = check_config(
            config,
            where,
            class_name="AutoencoderKL",
            required=("block_out_channels", "latent_channels"),
            only={"act_fn": ("silu",)},
            absent=("shift_factor", "latents_mean", "latents_std"),
        )
        channels = tuple(config["block_out_channels"])
        for key, block in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            per_block(config.get(key) or block, len(channels), key, where, {block: None})
        groups = config.get("norm_num_groups", 32)
        check_divisible(channels, (groups,) * len(channels), "norm_num_groups", where)
        return cls(
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            latent_channels=config["latent_channels"],
            block_out_channels=channels,
            layers_per_block=config.get("layers_per_block", 2),
            norm_num_groups=groups,
            scaling_factor=config.get("scaling_factor", 0.18215),
            use_quant_conv=config.get("use_quant_conv", True),
            use_post_quant_conv=config.get("use_post_quant_conv", True),
            mid_block_add_attention=config.get("mid_block_add_attention", True),
        )


class _MidBlock(nn.Module):
    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        cfg, c = self.config, x.shape[-1]
        x = ResnetBlock(c, cfg.norm_num_groups, _EPS, self.dtype, name="resnets.0")(x)
        if cfg.mid_block_add_attention:
            b, h, w, _ = x.shape
            name = "attentions.0"
            y = GroupNorm(cfg.norm_num_groups, _EPS, self.dtype, name=f"{name}.group_norm")(x)
            y = Attention(c, 1, qkv_bias=True, dtype=self.dtype, name=name)(y.reshape(b, h * w, c))
            x = x + y.reshape(b, h, w, c)
        return ResnetBlock(c, cfg.norm_num_groups, _EPS, self.dtype, name="resnets.1")(x)


class Encoder(nn.Module):
    """Pixels to 2 * latent_channels moments."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        cfg = self.config
        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, features in enumerate(cfg.block_out_channels):
            for j in range(cfg.layers_per_block):
                name = f"down_blocks.{i}.resnets.{j}"
                x = ResnetBlock(features, cfg.norm_num_groups, _EPS, self.dtype, name=name)(x)
            if i < len(cfg.block_out_channels) - 1:
                name = f"down_blocks.{i}.downsamplers.0.conv"
                x = Conv(
                    features,
                    strides=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=name,
                )(x)
        x = _MidBlock(cfg, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, _EPS, self.dtype, name="conv_norm_out")(x))
        return Conv(2 * cfg.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        cfg = self.config
        channels = cfg.block_out_channels[::-1]
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(z)
        x = _MidBlock(cfg, self.dtype, name="mid_block")(x)
        for i, features in enumerate(channels):
            for j in range(cfg.layers_per_block + 1):
                name = f"up_blocks.{i}.resnets.{j}"
                x = ResnetBlock(features, cfg.norm_num_groups, _EPS, self.dtype, name=name)(x)
            if i < len(channels) - 1:
                name = f"up_blocks.{i}.upsamplers.0.conv"
                x = Conv(features, dtype=self.dtype, name=name)(upsample_nearest(x))
        x = nn.silu(GroupNorm(cfg.norm_num_groups, _EPS, self.dtype, name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder; apply with `method="encode"` or `method="decode"`. Latents are unscaled."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.encoder = Encoder(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype)
        if cfg.use_quant_conv:
            self.quant_conv = Conv(2 * cfg.latent_channels, 1, padding=0, dtype=self.dtype)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = Conv(cfg.latent_channels, 1, padding=0, dtype=self.dtype)

    def encode(
        self, pixels: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
        """Pixels in [-1, 1] to the mean and log-variance of the latent, float32."""
        moments = self.encoder(pixels)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Latents to pixels, nominally in [-1, 1], float32."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """Encodes and decodes the mean; used to make parameters."""
        return self.decode(self.encode(pixels)[0])
