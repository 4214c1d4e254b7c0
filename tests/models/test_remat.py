"""A gradient that keeps less and computes it again is the same gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.lora import init_adapters
from safetydpo_jax.models import attention
from safetydpo_jax.train.step import KEEP_BARRIERS


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
