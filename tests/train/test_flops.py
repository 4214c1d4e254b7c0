"""The step's FLOPs against counts by hand, and against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.dpo_step import make_case
from safetydpo_jax.models import attention, winograd
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.train.flops import product_flops, step_flops

A, B = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 11))
PRODUCT = 2 * 3 * 5 * 7 * 11
X, KERNEL = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 2, 6))


@pytest.mark.parametrize(
    ("f", "args", "flops"),
    [
        (jnp.matmul, (A, B), PRODUCT),
        (lambda a, b: a @ b[0], (A, B), PRODUCT),
        (jax.jit(jnp.matmul), (A, B), PRODUCT),
        (jax.checkpoint(jnp.matmul), (A, B), PRODUCT),
        (lambda a, b: jax.lax.map(lambda x: x[0] @ x[1], (a, b)), (A, B), PRODUCT),
        (lambda a, b: jax.lax.cond(a.sum() > 0, jnp.matmul, lambda a, b: 0 * a @ b, a, b), (A, B),
         PRODUCT),
        (lambda a, b: a + 1, (A, B), 0),
        (lambda x, k: jax.lax.conv_general_dilated(
            x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2), (X, KERNEL), 2 * (2 * 4 * 4 * 6) * 3 * 3 * 2),
    ],
)  # fmt: skip
def test_products_are_counted(f, args, flops):
    """Each once, however they are wrapped, and a loop's as often as it runs."""
    assert sum(product_flops(f, *args)) == flops


def test_attention_counts_the_same_in_parts(monkeypatch):
    """XLA's count of it would fall with the number of parts."""
    qkv, flops = [jnp.zeros((2, 128, 4, 8))] * 3, 4 * 2 * 4 * 8 * 128**2
    for parts in (1, 8):
        monkeypatch.setattr(attention, "LOGITS", 8 * 4 * 128 * 128 // parts)
        attention._plain_attention.clear_cache()  # which does not know of LOGITS

        def attend(*qkv):  # JAX keeps traces by function, so it has to be a new one
            return attention.dot_product_attention(*qkv)

        assert ("scan" in str(jax.make_jaxpr(attend)(*qkv))) == (parts > 1)
        assert product_flops(attend, *qkv) == (0, flops)


def test_a_gradient_with_respect_to_activations():
    def f(x, y, weights):
        return ((x @ weights) @ y).sum()

    args = (A, jnp.zeros((3, 11, 5)), jnp.zeros((7, 11)))
    forward = product_flops(f, *args)
    assert forward == (2 * 3 * 5 * 7 * 11, 2 * 3 * 5 * 11 * 5)
    both = product_flops(jax.value_and_grad(f, (0, 1)), *args)
    assert sum(both) == sum(forward) + forward.backward


@pytest.mark.parametrize("recipe", ["paper", "anchored"])
def test_step_against_xla(recipe, monkeypatch):
    """The embedded model's. XLA counts additions too, but no tap on a convolution's padding."""
    # Winograd's convolutions have fewer than their FLOPs by convention.
    monkeypatch.setattr(winograd, "pay", lambda shape, features: False)
    pipeline = load_pipeline("emoji")
    null = jax.tree.map(lambda x: x[0], pipeline.encode_negative([""]))
    case = make_case(pipeline, null, recipe, None)
    shapes = {"latent_shape": pipeline.latent_shape, "null": null, "config": case.config}
    flops = step_flops(pipeline.unet, pipeline.unet_params, **shapes)
    arguments = case.state, pipeline.unet_params, case.batch, null, case.numbers
    lowered = case.step.lower(*arguments)
    assert lowered.cost_analysis()["flops"] == pytest.approx(flops, rel=0.15)
    case.config.accumulation *= 3
    thrice = step_flops(pipeline.unet, pipeline.unet_params, **shapes)
    assert thrice == pytest.approx(3 * flops)
