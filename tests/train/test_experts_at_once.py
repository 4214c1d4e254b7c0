"""Several experts in one step end as each would have alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax import lora, sharding
from safetydpo_jax.lora.adapters import routed
from safetydpo_jax.models.layers import Conv, Dense
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import TrainState, make_optimizer
from safetydpo_jax.train.step import make_train_step, numbers_of
from tests.train.test_step import distance, draws, mesh_of

EXPERTS = 3


class Layers(nn.Module):
    """Every kind of layer that an adapter can be on."""

    @nn.compact
    def __call__(self, x, text):
        x = nn.silu(Conv(8, name="conv")(x))
        x = (
            Conv(6, 1, padding=0, name="conv_1x1")(x)
            + Dense(6, name="time")(text[:, 0])[:, None, None]
        )
        return Dense(5, name="text")(text), Dense(4, name="out")(x)


def test_each_row_is_adapted_by_its_own_expert():
    x, text = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(5, 6, 6, 3), (5, 7, 9)])
    )
    layers = Layers()
    params = layers.init(jax.random.key(2), x, text)["params"]
    first = lora.init_adapters(jax.random.key(3), params, rank=2, targets=("conv.*", "time", ".*t"))
    several = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), (EXPERTS, *leaf.shape)), first
    )
    expert = jnp.array([2, 0, 1, 1, 2])
    found = layers.apply({"params": params, "lora": routed(several, expert)}, x, text)
    for row, of_row in enumerate(expert.tolist()):
        own = jax.tree.map(lambda leaf, i=of_row: leaf[i], several)
        alone = layers.apply({"params": params, "lora": own}, x[row : row + 1], text[row : row + 1])
        for ours, theirs in zip(found, alone, strict=True):
            np.testing.assert_allclose(ours[row : row + 1], theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def batches(batch):
    """Twenty batches of each expert: other rows, of which the last expert's weigh more."""

    def of(i):
        def change(path, x):
            if x.dtype == np.uint32 and "row_id" in str(path):
                return np.roll(x, i)
            return x if x.dtype == np.uint32 else np.float32((1 + i) * np.roll(x, i, axis=0))

        return draws(jax.tree_util.tree_map_with_path(change, batch), 20)

    return [of(i) for i in range(EXPERTS)]


def stacked(trees, axis=0):
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)


def trainer(small, config, null, devices, experts=None):
    """(first adapters, batches) -> the states after the first and the last, and the metrics."""
    mesh = mesh_of(devices)
    step = make_train_step(small.unet, small.schedule, config, mesh, experts)
    base = jax.device_put(small.unet_params, sharding.replicated(mesh))

    def train(adapters, batches):
        state = TrainState.create(
            jax.tree.map(jnp.array, adapters), make_optimizer(config), several=experts is not None
        )
        state = jax.device_put(state, sharding.replicated(mesh))
        states, history, numbers = [], [], numbers_of(config)
        for i, batch in enumerate(batches):
            state, metrics = step(state, base, batch, null, numbers(i))
            states.append(jax.tree.map(np.array, state))  # a copy: the next step takes the buffers
            history.append(jax.device_get(metrics))
        return states[0], states[-1], history

    return train


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"recipe": "paper", "optimizer.clip_norm": 0.01}, 8),
        ({"optimizer.name": "adafactor"}, 1),
        (
            {
                "loss.preference": "winner_preserving",
                "batch_size": 16,
                "preserve_batch_size": 16,
                "accumulation": 2,
            },
            1,
        ),
    ],
    ids=["paper, clipped, 8 devices", "adafactor", "winner_preserving, accumulated"],
)
def test_several_experts_are_as_if_alone(changes, devices, config, small, adapters, batches, null):
    config.batch_size = config.preserve_batch_size = 32
    config.optimizer.learning_rate = 2e-3
    config.update_from_flattened_dict(changes)
    config = resolve(config)
    if not config.preserve_batch_size:
        batches = [[{k: b[k] for k in b if k != "preserve"} for b in each] for each in batches]
    first = [jax.tree.map(lambda x, s=s: s * x, adapters) for s in (1.0, 0.5, 2.0)]

    train_all = trainer(small, config, null, devices, EXPERTS)
    together = [stacked(each, axis=1) for each in zip(*batches, strict=True)]
    *states, history = train_all(stacked(first), together)
    train = trainer(small, config, null, devices)
    for i in range(EXPERTS):
        ours = [jax.tree.map(lambda x, i=i: x[i] if x.ndim else x, state) for state in states]
        *theirs, own_history = train(first[i], batches[i])
        # The moments after one step are the clipped gradient's, its square's with Adafactor.
        assert distance(ours[0].opt_state, theirs[0].opt_state) < 1e-5
        assert distance(ours[1].adapters, theirs[1].adapters) < 1e-3
        assert distance(theirs[1].adapters, first[i]) > 1e-2
        assert history[0].keys() == own_history[0].keys()
        for name, values in history[0].items():
            np.testing.assert_allclose(values[i], own_history[0][name], rtol=1e-4, atol=1e-5)
