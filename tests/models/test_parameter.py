"""A module's parameters are Flax's own, but for what finding them costs."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.models.layers import Conv, Dense
from safetydpo_jax.models.parameter import parameter


class Ours(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ parameter(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], 3))


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.initializers.lecun_normal()
        return x @ self.param("kernel", kernel, (x.shape[-1], 3), jnp.float32)


def test_the_same_as_flax():
    x, key = jnp.ones((2, 5)), jax.random.key(0)
    ours, theirs = Ours().init(key, x), Flax().init(key, x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (Ours().apply(ours, x) == Flax().apply(ours, x)).all()


@pytest.mark.parametrize("module", [Dense(3), Conv(3)])
def test_another_shape(module):
    x = jnp.ones((1, 4, 4, 5))
    params = module.init(jax.random.key(0), x)
    with pytest.raises(flax.errors.ScopeParamShapeError, match="kernel"):
        module.apply(params, x[..., :4])


def test_none_there():
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        Dense(3).apply({"params": {"bias": jnp.zeros(3)}}, jnp.ones((2, 5)))
