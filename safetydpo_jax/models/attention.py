"""The one entry to attention; a platform's faster kernel belongs here and nowhere else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from safetydpo_jax.models.layers import Dense, LayerNorm


def dot_product_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    causal: bool = False,
) -> Float[Array, "b t h d"]:
    """softmax(q k^T / sqrt(d)) v, with float32 logits and softmax."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """diffusers' Attention: to_q, to_k, to_v, to_out.0; over `context` or, without it, over x."""

    features: int
    heads: int
    qkv_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"] | None = None
    ) -> Float[Array, "b t c"]:
        context = x if context is None else context

        def project(name: str, inputs: Float[Array, "b n d"]) -> Float[Array, "b n h e"]:
            y = Dense(self.features, self.qkv_bias, self.dtype, name=name)(inputs)
            return y.reshape(*y.shape[:2], self.heads, self.features // self.heads)

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        y = dot_product_attention(q, k, v).reshape(x.shape[0], x.shape[1], self.features)
        return Dense(self.features, dtype=self.dtype, name="to_out.0")(y)


class TransformerBlock(nn.Module):
    """diffusers' BasicTransformerBlock: self-attention, cross-attention, GEGLU feed-forward."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b t c"]:
        c = x.shape[-1]
        h = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + Attention(c, self.heads, dtype=self.dtype, name="attn1")(h)
        h = LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = x + Attention(c, self.heads, dtype=self.dtype, name="attn2")(h, context)
        h = LayerNorm(dtype=self.dtype, name="norm3")(x)
        h, gate = jnp.split(Dense(8 * c, dtype=self.dtype, name="ff.net.0.proj")(h), 2, -1)
        h = h * nn.gelu(gate, approximate=False)
        return x + Dense(c, dtype=self.dtype, name="ff.net.2")(h)
