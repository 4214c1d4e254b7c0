"""bfloat16 products on a CPU: close to float32's, gradients too, and taken only when asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.models import mixed
from safetydpo_jax.models.layers import Conv, Dense


@pytest.mark.parametrize("x_shape", [(2, 64, 24), (3, 5, 24)])
def test_values_and_gradients_are_those_of_float32(x_shape):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x_shape, (24, 40)))
    expected, plain_vjp = jax.vjp(jnp.matmul, x, w)
    found, fast_vjp = jax.vjp(mixed.matmul, x, w)
    dy = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for a, b in zip((found, *fast_vjp(dy)), (expected, *plain_vjp(dy)), strict=True):
        assert a.dtype == jnp.float32
        assert float(jnp.abs(a - b).max() / jnp.abs(b).max()) < 1e-2


@pytest.mark.parametrize("layer", [Dense(48), Conv(48), Conv(48, 1, padding=0)])
@pytest.mark.parametrize("gains", [True, False])
def test_layers_change_only_inside_the_context(layer, gains, monkeypatch):
    """And only where the processor has units for it."""
    monkeypatch.setattr(mixed, "has_units", lambda: gains)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 128))
    params = layer.init(jax.random.key(1), x)
    exact = layer.apply(params, x)
    with jax.default_matmul_precision("bfloat16"):
        rounded = layer.apply(params, x)
    error = float(jnp.abs(exact - rounded).max() / jnp.abs(exact).max())
    assert error < 1e-2
    assert (error > 0) == gains
    np.testing.assert_array_equal(exact, layer.apply(params, x))


def test_convolutions_that_would_not_gain_stay_exact(monkeypatch):
    monkeypatch.setattr(mixed, "has_units", lambda: True)
    for shape, features in (((1, 4, 4, 64), 64), ((1, 16, 16, 128), 8)):
        x, layer = jax.random.normal(jax.random.key(0), shape), Conv(features)
        params = layer.init(jax.random.key(1), x)
        exact = layer.apply(params, x)
        with jax.default_matmul_precision("bfloat16"):
            # On a CPU float32 products stay float32 unless the layer itself rounds.
            np.testing.assert_array_equal(exact, layer.apply(params, x))


@pytest.mark.parametrize(
    ("info", "has"),
    [
        ("model name : x\nflags\t\t: fpu avx2 avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 fma\nbugs : bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),  # on ARM XLA has no faster kernels for it
        (None, False),
    ],
)
def test_which_processors_gain(info, has, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    if info is not None:
        file.write_text(info)
    monkeypatch.setattr(mixed.pathlib, "Path", lambda _: file)
    assert mixed.has_units.__wrapped__() == has
