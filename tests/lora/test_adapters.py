import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax import lora
from safetydpo_jax.errors import UserError

# Dense layers of 400 x 300 under names as in a UNet, and a convolution.
KERNEL = jax.ShapeDtypeStruct((400, 300), jnp.float32)
PARAMS = {
    "down_blocks.0": {
        "attn1": {name: {"kernel": KERNEL} for name in ("to_q", "to_k", "to_out.0")},
        "attn2": {name: {"kernel": KERNEL} for name in ("to_q", "to_k", "to_out.0")},
        "conv1": {"kernel": jax.ShapeDtypeStruct((3, 3, 400, 300), jnp.float32)},
        "norm1": {"scale": jax.ShapeDtypeStruct((400,), jnp.float32)},
    }
}


def init(rank=4, targets=("to_q",), seed=0):
    return lora.init_adapters(jax.random.key(seed), PARAMS, rank=rank, targets=targets)


def test_starts_as_peft_does():
    layer = init()["down_blocks.0"]["attn1"]["to_q"]
    assert layer["a"].shape == (400, 4)
    assert layer["b"].shape == (4, 300)
    np.testing.assert_allclose(layer["a"].std(), 1 / 4, rtol=0.1)
    assert abs(layer["a"].mean()) < 0.02
    assert not layer["b"].any()


def test_a_convolutions_first_factor_is_one_too():
    layer = init(targets=("conv1",))["down_blocks.0"]["conv1"]
    assert layer["a"].shape == (3, 3, 400, 4)
    assert layer["b"].shape == (4, 300)
    np.testing.assert_allclose(layer["a"].std(), 1 / 4, rtol=0.1)


def test_a_layer_does_not_depend_on_the_others():
    few, more = init(targets=("to_q",)), init(targets=("to_k", "to_q"))
    block = "down_blocks.0"
    np.testing.assert_array_equal(
        few[block]["attn2"]["to_q"]["a"], more[block]["attn2"]["to_q"]["a"]
    )
    a1, a2 = (few[block][name]["to_q"]["a"] for name in ("attn1", "attn2"))
    assert not np.array_equal(a1, a2)
    assert not np.array_equal(init(seed=1)[block]["attn1"]["to_q"]["a"], a1)


def test_scaled_folds_alpha_into_b():
    adapters = jax.tree.map(jnp.ones_like, init())
    layer = lora.scaled(adapters, 8.0, 4)["down_blocks.0"]["attn1"]["to_q"]
    assert (layer["a"] == 1).all()
    assert (layer["b"] == 2).all()


def test_count():
    assert lora.count(init()) == 2 * 4 * (400 + 300)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("to_q",), 2),
        (("to_q", "to_q"), 2),
        (("to_q", "to_out.0"), 4),
        ((r"attn2\.to_k",), 1),
        ((r"attn1\..*",), 3),
        ((r"conv\d",), 1),
        ((r"down_blocks\.0\.attn1\.to_q",), 1),
    ],
)
def test_targets(targets, count):
    assert len(lora.module_paths(PARAMS, targets)) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("to_x",)}, "'to_x' matches no layer of the UNet"),
        ({"targets": ("o_q",)}, "'o_q' matches no layer"),
        ({"targets": ("to_(",)}, "no regular expression"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"rank": 0}, "lora.rank is 0, but .* use a rank from 1 to 300"),
        ({"rank": 301}, "lora.rank is 301"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(UserError, match=message):
        init(**changes)
