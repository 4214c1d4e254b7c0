"""A gradient that keeps less and computes it again is the same gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.lora import init_adapters
from safetydpo_jax.models import attention, layers
from safetydpo_jax.train.step import KEEP_BARRIERS, SPARING

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.mark.parametrize("widest", [attention.WIDEST, 2**14])
def test_recomputing_changes_the_work_alone(pipeline, monkeypatch, widest):
    """Of the gradient with respect to adapters on every attention layer; feed-forward in parts."""
    monkeypatch.setattr(attention, "WIDEST", widest)
    adapters = init_adapters(
        jax.random.key(0), pipeline.unet_params, rank=2, targets=("to_q", "to_v", "conv1")
    )
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    latents = jax.random.normal(jax.random.key(1), (4, 16, 16, 4))
    text = jax.random.normal(jax.random.key(2), (4, 12, 16))
    results = []
    for unet in (pipeline.unet, pipeline.unet.clone(remat=True)):

        def loss(adapters, unet=unet):
            variables = {"params": pipeline.unet_params, "lora": adapters}
            return (unet.apply(variables, latents, jnp.arange(4), text) ** 2).mean()

        compiled = jax.jit(jax.grad(loss), compiler_options=KEEP_BARRIERS).lower(adapters).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        results.append((compiled(adapters), compiled.cost_analysis()["flops"], memory))
    (plain, once, much), (again, twice, little) = results
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), plain, again)
    assert 1.1 * once < twice < 1.5 * once
    assert little < 0.7 * much


def test_adapters_gradients_do_not_wait(monkeypatch):
    """Or all that they are made of would be in memory at the end of a step."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(16):
                block = nn.remat(layers.Dense)(256, name=f"layer_{i}.to_q")
                x = jnp.tanh(block(x))
            return x

    x = jnp.ones((1024, 256))
    params = Stack().init(jax.random.key(0), x)["params"]
    adapters = init_adapters(jax.random.key(0), params, rank=2, targets=("to_q",))

    def temporaries():
        def loss(adapters, x):
            return Stack().apply({"params": params, "lora": adapters}, x).sum()

        lowered = jax.jit(jax.grad(loss), compiler_options=KEEP_BARRIERS | SPARING)
        return lowered.lower(adapters, x).compile().memory_analysis().temp_size_in_bytes

    little = temporaries()
    monkeypatch.setattr(layers, "together", lambda *arrays: arrays)
    assert little < 0.8 * temporaries()
