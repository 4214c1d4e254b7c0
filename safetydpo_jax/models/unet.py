"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL, built from a checkpoint's config.json.

Source: Rombach et al. 2022 (latent diffusion), Podell et al. 2023 (SDXL); names and arithmetic as
in diffusers' `UNet2DConditionModel`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from safetydpo_jax.errors import UserError
from safetydpo_jax.models.attention import TransformerBlock
from safetydpo_jax.models.config import check_config, check_divisible, one_number, per_block
from safetydpo_jax.models.layers import (
    Conv,
    Dense,
    ResnetBlock,
    sinusoidal_embedding,
    upsample_nearest,
)
from safetydpo_jax.models.norms import GroupNorm

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The keys of `unet/config.json` that shape the network.

    `attention_heads` and `transformer_layers` hold one entry a resolution. In these checkpoints the
    key "attention_head_dim" counts heads (diffusers #2011), which is how it is read here.
    """

    sample_size: int
    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    layers_per_block: int
    attention_heads: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    cross_attention_dim: int
    use_linear_projection: bool
    norm_num_groups: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    addition_time_embed_dim: int | None
    projection_class_embeddings_input_dim: int | None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "unet/config.json") -> "UNetConfig":
        """Reads a diffusers config.

        Raises:
          UserError: a key is missing, or asks for something this UNet does not do.
        """
        text_time = config.get("addition_embed_type") == "text_time"
        required = ("block_out_channels", "cross_attention_dim", "in_channels", "out_channels")
        if text_time:
            required += ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        config = check_config(
            config,
            where,
            class_name="UNet2DConditionModel",
            required=required,
            only={
                "act_fn": ("silu", "swish"),
                "mid_block_type": ("UNetMidBlock2DCrossAttn",),
                "mid_block_scale_factor": (1, 1.0),
                "addition_embed_type": (None, "text_time"),
                "time_embedding_type": ("positional",),
                "resnet_time_scale_shift": ("default",),
                "resnet_out_scale_factor": (1, 1.0),
                "attention_type": ("default",),
                "conv_in_kernel": (3,),
                "conv_out_kernel": (3,),
                "downsample_padding": (1,),
            },
            absent=(
                "center_input_sample",
                "dual_cross_attention",
                "only_cross_attention",
                "class_embed_type",
                "num_class_embeds",
                "encoder_hid_dim",
                "encoder_hid_dim_type",
                "time_cond_proj_dim",
                "time_embedding_dim",
                "time_embedding_act_fn",
                "timestep_post_act",
                "resnet_skip_time_act",
                "class_embeddings_concat",
                "mid_block_only_cross_attention",
                "cross_attention_norm",
                "reverse_transformer_layers_per_block",
            ),
        )
        if config.get("mid_block_type", "") is None:  # which is not the default, but none at all
            raise UserError(
                f"{where}: 'mid_block_type' is null; UNets without it are not supported"
            )
        channels = tuple(config["block_out_channels"])
        n = len(channels)
        down = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * (n - 1) + [
            "DownBlock2D"
        ]
        up = config.get("up_block_types") or ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (n - 1)
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        heads = per_block(heads, n, "attention_head_dim", where)
        groups = one_number(config, "norm_num_groups", 32, where)
        check_divisible(channels, heads, "attention_head_dim", where)
        check_divisible(channels, (groups,) * n, "norm_num_groups", where)
        return cls(
            sample_size=one_number(config, "sample_size", 64, where),
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            block_out_channels=channels,
            down_attention=per_block(down, n, "down_block_types", where, _DOWN),
            up_attention=per_block(up, n, "up_block_types", where, _UP),
            layers_per_block=one_number(config, "layers_per_block", 2, where),
            attention_heads=heads,
            transformer_layers=per_block(
                config.get("transformer_layers_per_block", 1),
                n,
                "transformer_layers_per_block",
                where,
            ),
            cross_attention_dim=config["cross_attention_dim"],
            use_linear_projection=bool(config.get("use_linear_projection", False)),
            norm_num_groups=groups,
            norm_eps=config.get("norm_eps", 1e-5),
            flip_sin_to_cos=config.get("flip_sin_to_cos", True),
            freq_shift=float(config.get("freq_shift", 0)),
            addition_time_embed_dim=config["addition_time_embed_dim"] if text_time else None,
            projection_class_embeddings_input_dim=(
                config["projection_class_embeddings_input_dim"] if text_time else None
            ),
        )


def _recomputed(block: type[nn.Module], remat: bool) -> Any:
    return nn.remat(block) if remat else block


class Transformer2D(nn.Module):
    """diffusers' Transformer2DModel: norm, project in, blocks over h*w tokens, project out."""

    config: UNetConfig
    heads: int
    layers: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = GroupNorm(self.config.norm_num_groups, 1e-6, self.dtype, name="norm")(x)
        if self.config.use_linear_projection:
            y = Dense(c, dtype=self.dtype, name="proj_in")(y.reshape(b, h * w, c))
        else:
            y = Conv(c, 1, padding=0, dtype=self.dtype, name="proj_in")(y).reshape(b, h * w, c)
        for i in range(self.layers):
            block = _recomputed(TransformerBlock, self.remat)
            y = block(self.heads, self.dtype, self.remat, name=f"transformer_blocks.{i}")(
                y, context
            )
        if self.config.use_linear_projection:
            y = Dense(c, dtype=self.dtype, name="proj_out")(y).reshape(b, h, w, c)
        else:
            y = Conv(c, 1, padding=0, dtype=self.dtype, name="proj_out")(y.reshape(b, h, w, c))
        return x + y


class UNetBlock(nn.Module):
    """One resolution on the way down, in the middle or on the way up.

    `skips`, when given, are concatenated to the input of each residual block, last one first.
    `attentions` says after which residual blocks a transformer stands.
    """

    config: UNetConfig
    level: int
    attentions: tuple[bool, ...]
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        temb: Float[Array, "b e"],
        context: Float[Array, "b s d"],
        skips: tuple[Float[Array, "b h w _"], ...] = (),
    ) -> tuple[Float[Array, "b h w c2"], tuple[Float[Array, "b h w c2"], ...]]:
        cfg, features = self.config, self.config.block_out_channels[self.level]
        outputs, j = [], 0
        for i, attends in enumerate(self.attentions):
            if skips:
                x = jnp.concatenate([x, skips[-1 - i]], -1)
            resnet = _recomputed(ResnetBlock, self.remat)(
                features, cfg.norm_num_groups, cfg.norm_eps, self.dtype, name=f"resnets.{i}"
            )
            x = resnet(x, temb)
            if attends:
                transformer = Transformer2D(
                    cfg,
                    cfg.attention_heads[self.level],
                    cfg.transformer_layers[self.level],
                    self.dtype,
                    self.remat,
                    name=f"attentions.{j}",
                )
                x, j = transformer(x, context), j + 1
            outputs.append(x)
        return x, tuple(outputs)


class UNet2DConditionModel(nn.Module):
    """The denoiser. Names follow the diffusers state dict; arrays are NHWC.

    `dtype` is the compute type; parameters keep the type they are stored in, norms are float32.
    With `remat` a gradient keeps the inputs of residual and transformer blocks alone and computes
    what is inside of them again.
    """

    config: UNetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, "b"],
        prompt_embeds: Float[Array, "b s d"],
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Real[Array, "b 6"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Predicts noise or velocity.

        Args:
          latents: noisy latents, scaled as in training.
          timesteps: 0 .. num_train_timesteps - 1, one an example; Euler's need not be whole.
          prompt_embeds: text encoder states.
          text_embeds: SDXL's pooled text (`conditioning.Conditioning`).
          time_ids: SDXL's sizes in pixels.

        Returns:
          The model output in float32, of the shape of `latents`.
        """
        cfg, dtype = self.config, self.dtype
        channels = cfg.block_out_channels
        temb = self._time_embedding(timesteps, text_embeds, time_ids)
        context = prompt_embeds.astype(dtype)
        x = Conv(channels[0], dtype=dtype, name="conv_in")(latents)
        stack = [x]
        last = len(channels) - 1
        for i, attends in enumerate(cfg.down_attention):
            block = UNetBlock(
                cfg,
                i,
                (attends,) * cfg.layers_per_block,
                dtype,
                self.remat,
                name=f"down_blocks.{i}",
            )
            x, outputs = block(x, temb, context)
            stack.extend(outputs)
            if i < last:
                name = f"down_blocks.{i}.downsamplers.0.conv"
                x = Conv(channels[i], strides=2, dtype=dtype, name=name)(x)
                stack.append(x)
        x, _ = UNetBlock(cfg, last, (True, False), dtype, self.remat, name="mid_block")(
            x, temb, context
        )
        for i, attends in enumerate(cfg.up_attention):
            level = last - i
            n = cfg.layers_per_block + 1
            skips, stack = tuple(stack[-n:]), stack[:-n]
            block = UNetBlock(cfg, level, (attends,) * n, dtype, self.remat, name=f"up_blocks.{i}")
            x, _ = block(x, temb, context, skips)
            if level > 0:
                # An odd size was rounded up on the way down: the next skip tells the true size.
                h, w = stack[-1].shape[1:3]
                x = upsample_nearest(x)[:, :h, :w]
                name = f"up_blocks.{i}.upsamplers.0.conv"
                x = Conv(channels[level], dtype=dtype, name=name)(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, cfg.norm_eps, dtype, name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=dtype, name="conv_out")(x).astype(jnp.float32)

    def _time_embedding(
        self, timesteps: Real[Array, "b"], text_embeds: Array | None, time_ids: Array | None
    ) -> Float[Array, "b e"]:
        cfg, width = self.config, 4 * self.config.block_out_channels[0]

        def sinusoids(t: Array, dim: int) -> Array:
            return sinusoidal_embedding(
                t, dim, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift
            )

        def mlp(x: Array, name: str) -> Array:
            x = nn.silu(Dense(width, dtype=self.dtype, name=f"{name}.linear_1")(x))
            return Dense(width, dtype=self.dtype, name=f"{name}.linear_2")(x)

        temb = mlp(sinusoids(timesteps, cfg.block_out_channels[0]), "time_embedding")
        if cfg.addition_time_embed_dim is None:
            return temb
        if text_embeds is None or time_ids is None:
            raise ValueError("this UNet (SDXL) also needs text_embeds (b, p) and time_ids (b, 6)")
        times = sinusoids(time_ids.reshape(-1), cfg.addition_time_embed_dim)
        times = times.reshape(len(time_ids), -1)
        extra = jnp.concatenate([text_embeds.astype(jnp.float32), times], -1)
        return temb + mlp(extra, "add_embedding")
