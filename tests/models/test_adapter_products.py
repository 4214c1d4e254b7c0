"""Linear layers as TPUs have them, computed here: adapters' products, and results taken apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.models import adapter_products
from safetydpo_jax.models.layers import Dense
from safetydpo_jax.models.target import compiling_for

RANK = 6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def apart(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def test_down_is_as_exact_as_float32(rng):
    x = jnp.asarray(rng.normal(size=(2, 64, 48)), jnp.bfloat16)
    a = jnp.asarray(rng.normal(size=(48, RANK)), jnp.float32)
    h, pull_back = jax.vjp(jax.jit(adapter_products.down), x, a)
    dh = jnp.asarray(rng.normal(size=h.shape), jnp.float32)
    dx, da = pull_back(dh)
    wide = [np.asarray(y, np.float64) for y in (x, a, dh)]
    assert (h.dtype, dx.dtype, da.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert apart(h, wide[0] @ wide[1]) < 1e-6
    assert apart(da, np.einsum("btc,btr->cr", wide[0], wide[2])) < 1e-6
    assert apart(dx, wide[2] @ wide[1].T) < 2**-8


def test_up_is_as_exact_as_its_type(rng):
    h = jnp.asarray(rng.normal(size=(2, 64, RANK)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(RANK, 48)), jnp.float32)
    y, pull_back = jax.vjp(jax.jit(adapter_products.up), h, b)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.bfloat16)
    dh, db = pull_back(dy)
    wide = [np.asarray(x, np.float64) for x in (h, b, dy)]
    assert (y.dtype, dh.dtype, db.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert apart(y, wide[0] @ wide[1]) < 2**-8
    assert apart(dh, wide[2] @ wide[1].T) < 1e-6
    assert apart(db, np.einsum("btr,btn->rn", wide[0], wide[2])) < 1e-6
    exact = adapter_products._product(*adapter_products._narrow(h, b))
    assert apart(exact, wide[0] @ wide[1]) < 1e-6


def test_bfloat16_alone_is_not_that_exact(rng):
    """What the bounds above would find."""
    x, a = (jnp.asarray(rng.normal(size=shape)) for shape in ((64, 48), (48, RANK)))
    half = jnp.matmul(*(y.astype(jnp.bfloat16) for y in (x, a)), preferred_element_type=jnp.float32)
    assert apart(half, np.asarray(x, np.float64) @ np.asarray(a, np.float64)) > 1e-4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_a_layer_is_the_same_on_every_platform(rng, dtype, bound, parts, gated):
    layer = Dense(32, parts=parts, dtype=dtype)
    x = jnp.asarray(rng.normal(size=(4, 16, 24)), dtype)
    params = layer.init(jax.random.key(0), x)["params"]
    params["bias"] = jnp.asarray(rng.normal(size=32), jnp.float32)
    lora = {
        "a": jnp.asarray(rng.normal(size=(24, RANK)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(RANK, 32)), jnp.float32),
    }
    if gated:
        lora["gate"] = jnp.asarray(rng.normal(size=(4, RANK)), jnp.float32)
    directions = jnp.asarray(rng.normal(size=(4, 16, 32)), jnp.float32)

    def loss(lora, x):
        y = layer.apply({"params": params, "lora": lora}, x)
        y = jnp.concatenate(y, -1) if parts > 1 else y
        return (y.astype(jnp.float32) * directions).sum(), y

    here = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(lora, x)
    with compiling_for("tpu"):
        there = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(lora, x)
    jax.tree.map(lambda y, z: np.testing.assert_array_less(apart(z, y), bound), here, there)
