import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from safetydpo_jax.errors import UserError
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import Checkpoints, TrainState, learning_rate, make_optimizer


@pytest.fixture
def state(config, adapters):
    optimizer = make_optimizer(resolve(config))
    state = TrainState.create(adapters, optimizer)
    updates, opt_state = optimizer.update(adapters, state.opt_state, adapters)
    return TrainState(jnp.int32(3), optax.apply_updates(adapters, updates), opt_state)


def opened(folder, settings=None, keep=2):
    return Checkpoints(
        folder, settings or {"category": "hate", "lora.targets": ("to_q",)}, keep=keep
    )


def test_what_was_saved_comes_back_bit_for_bit(state, tmp_path):
    checkpoints = opened(tmp_path / "checkpoints")
    assert checkpoints.restore(state) is None
    checkpoints.save(state)
    empty = jax.tree.map(jnp.zeros_like, state)
    found = opened(tmp_path / "checkpoints").restore(empty)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_the_last_few_are_kept_without_pickle(state, tmp_path):
    checkpoints = opened(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(state.replace(step=jnp.int32(step)))
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert {"2", "3"} <= names
    assert "1" not in names
    for file in (tmp_path / "checkpoints").rglob("*"):
        assert file.suffix not in (".pkl", ".pickle", ".pt", ".bin")
        assert file.is_dir() or not file.read_bytes().startswith(b"\x80")


def test_an_unfinished_checkpoint_is_not_taken(state, tmp_path):
    opened(tmp_path / "checkpoints").save(state)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1").mkdir()
    assert int(opened(tmp_path / "checkpoints").restore(state).step) == 3


def test_other_settings_are_refused(state, tmp_path):
    opened(tmp_path / "checkpoints").save(state)
    other = opened(tmp_path / "checkpoints", {"category": "violence", "lora.targets": ("to_q",)})
    with pytest.raises(
        UserError, match=r"category = 'hate', but now it is 'violence': .*--workdir"
    ):
        other.restore(state)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (3, 2)])
def test_states_of_another_version_are_refused(state, tmp_path, before, now):
    settings = {"category": "hate"}
    Checkpoints(tmp_path, settings, keep=2, version=before).save(state)
    with pytest.raises(UserError, match="made by another version of this program.*--workdir"):
        Checkpoints(tmp_path, settings, keep=2, version=now).restore(state)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0] * 10),
        ("constant", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant", 1, [1.0] * 10),
        ("cosine", 2, [0.5, 1.0] + [0.5 + 0.5 * np.cos(np.pi * i / 8) for i in range(8)]),
    ],
)
def test_learning_rate(schedule, warmup, expected, config):
    config.optimizer.schedule, config.optimizer.warmup_steps = schedule, warmup
    config.optimizer.learning_rate = 1.0
    rate = learning_rate(config)
    np.testing.assert_allclose([rate(i) for i in range(10)], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_optimizers_are_pytorch_s(name, config):
    rng = np.random.default_rng(0)
    config.optimizer.name, config.optimizer.learning_rate = name, 1e-2
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 1e9
    start = {"a": rng.normal(size=(16, 4)).astype("f4"), "b": np.zeros((4, 12), "f4")}
    theirs = {key: torch.nn.Parameter(torch.tensor(x.T.copy())) for key, x in start.items()}
    if name == "adamw":
        optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=1e-2)
    else:
        options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        optimizer = transformers.optimization.Adafactor(theirs.values(), lr=1e-2, **options)
    ours, rule = start, make_optimizer(config)
    state = rule.init(ours)
    for scale in range(1, 7):
        gradient = {key: scale * rng.normal(size=x.shape).astype("f4") for key, x in start.items()}
        for key, x in theirs.items():
            x.grad = torch.tensor(gradient[key].T.copy())
        optimizer.step()
        updates, state = rule.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
    for key, x in theirs.items():
        np.testing.assert_allclose(ours[key], x.detach().numpy().T, atol=1e-6)
        assert np.abs(ours[key] - start[key]).max() > 0.03
