"""CLIP's text encoder, built from a checkpoint's text_encoder/config.json.

Source: Radford et al. 2021; names and arithmetic as in transformers' `CLIPTextModel`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from safetydpo_jax.errors import UserError
from safetydpo_jax.models.attention import dot_product_attention
from safetydpo_jax.models.config import check_config, check_divisible
from safetydpo_jax.models.layers import Dense, Embedding
from safetydpo_jax.models.norms import LayerNorm

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The keys of `text_encoder/config.json` that shape the network."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    projection_dim: int | None

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], where: str = "text_encoder/config.json"
    ) -> "CLIPTextConfig":
        """Reads a transformers config; UserError names a key that is missing or not supported."""
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        config = check_config(
            config,
            where,
            class_name="CLIPTextModel",
            required=required,
            only={"hidden_act": tuple(_ACTIVATIONS)},
        )
        architecture = (config.get("architectures") or ["CLIPTextModel"])[0]
        if architecture not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise UserError(f"{where}: a {architecture} is not a CLIP text encoder")
        check_divisible(
            (config["hidden_size"],), (config["num_attention_heads"],), "num_attention_heads", where
        )
        projects = architecture == "CLIPTextModelWithProjection"
        return cls(
            **{key: config[key] for key in required},
            max_position_embeddings=config.get("max_position_embeddings", 77),
            hidden_act=config.get("hidden_act", "quick_gelu"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-5),
            eos_token_id=config.get("eos_token_id", 2),
            projection_dim=config.get("projection_dim", 512) if projects else None,
        )


class CLIPTextOutput(NamedTuple):
    """What the text encoder gives.

    Attributes:
      last_hidden_state: (b, t, d), after the final norm (Stable Diffusion 1.x and 2.x).
      pooler_output: (b, d) or, with a projection, (b, p): the state at the end-of-text token.
      hidden_states: embeddings and every layer's output, (b, t, d) each; SDXL takes the last but
        one.
    """

    last_hidden_state: Float[Array, "b t d"]
    pooler_output: Float[Array, "b p"]
    hidden_states: tuple[Float[Array, "b t d"], ...]


class CLIPEncoderLayer(nn.Module):
    """Pre-norm causal self-attention and a two-layer MLP."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        cfg, (b, t, d) = self.config, x.shape
        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm1")(x)

        def heads(name: str) -> Float[Array, "b t h e"]:
            y = Dense(d, dtype=self.dtype, name=f"self_attn.{name}")(h)
            return y.reshape(b, t, cfg.num_attention_heads, -1)

        y = dot_product_attention(heads("q_proj"), heads("k_proj"), heads("v_proj"), causal=True)
        x = x + Dense(d, dtype=self.dtype, name="self_attn.out_proj")(y.reshape(b, t, d))
        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm2")(x)
        h = Dense(cfg.intermediate_size, dtype=self.dtype, name="mlp.fc1")(h)
        h = _ACTIVATIONS[cfg.hidden_act](h)
        return x + Dense(d, dtype=self.dtype, name="mlp.fc2")(h)


class CLIPTextModel(nn.Module):
    """The text encoder, with SDXL's text projection where the config has one."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b t"]) -> CLIPTextOutput:
        cfg = self.config
        embed = "text_model.embeddings"
        tokens = Embedding(
            cfg.vocab_size, cfg.hidden_size, self.dtype, name=f"{embed}.token_embedding"
        )
        positions = Embedding(
            cfg.max_position_embeddings,
            cfg.hidden_size,
            self.dtype,
            name=f"{embed}.position_embedding",
        )
        x = tokens(input_ids) + positions(jnp.arange(input_ids.shape[1]))
        states = [x]
        for i in range(cfg.num_hidden_layers):
            x = CLIPEncoderLayer(cfg, self.dtype, name=f"text_model.encoder.layers.{i}")(x)
            states.append(x)
        norm = LayerNorm(cfg.layer_norm_eps, self.dtype, name="text_model.final_layer_norm")
        last = norm(x)
        if cfg.eos_token_id == 2:
            # Published configs say 2, which is not the end-of-text id: transformers then takes the
            # largest id, since end-of-text closes CLIP's vocabulary.
            end = input_ids.argmax(-1)
        else:
            end = (input_ids == cfg.eos_token_id).argmax(-1)
        pooled = last[jnp.arange(last.shape[0]), end]
        if cfg.projection_dim is not None:
            pooled = Dense(
                cfg.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
            )(pooled)
        return CLIPTextOutput(last, pooled, tuple(states))
