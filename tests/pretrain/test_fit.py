"""The pretraining loop: a killed run resumes to the same weights, and a diverging one stops."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.emoji_base import get_config
from safetydpo_jax.errors import UserError
from safetydpo_jax.pretrain.fit import fit, quiet_residuals


def settings(**changes):
    config = get_config().denoiser_training
    config.update(
        {"steps": 12, "warmup_steps": 2, "decay_steps": 4, "log_every": 3, "save_every": 4}
    )
    config.update(changes)
    return config


def noisy_loss(params, batch, key):
    target = batch + 0.1 * jax.random.normal(key, batch.shape)
    return jnp.square(params["w"] - target).mean(), {"w": params["w"].mean()}


def batches(step):
    return np.random.default_rng(step).normal(size=8).astype(np.float32)


def train(workdir, config, batches=batches, loss=noisy_loss):
    return fit("toy", config, {"w": jnp.zeros(8)}, loss, batches, workdir, seed=0)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole", settings())

    def killed_at_ten(step):
        if step == 10:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", settings(), killed_at_ten)
    seen = []
    resumed = train(
        tmp_path / "killed", settings(), lambda step: (seen.append(step), batches(step))[1]
    )
    assert seen == [8, 9, 10, 11]
    np.testing.assert_array_equal(whole["w"], resumed["w"])
    lines = (tmp_path / "whole" / "toy" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9, 12]


def test_too_few_steps_for_the_schedule(tmp_path):
    with pytest.raises(UserError, match="steps is 5, warmup_steps 2 and decay_steps 4: steps must"):
        train(tmp_path, settings(steps=5))


def test_a_stopped_run_keeps_its_step(tmp_path, capsys):
    def stopped_at_six(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(step)

    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "stopped", settings(), stopped_at_six)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; step 6 is saved" in capsys.readouterr().out
    resumed = train(tmp_path / "stopped", settings())
    np.testing.assert_array_equal(resumed["w"], train(tmp_path / "whole", settings())["w"])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def broken(params, batch, key):
        return jnp.log(params["w"] - 1.0).mean(), {}

    with pytest.raises(UserError, match="lower learning_rate"):
        train(tmp_path, settings(), loss=broken)


def test_what_is_not_finite_is_not_kept(tmp_path):
    def bad_later(step):
        return batches(step) * (np.nan if step >= 6 else 1)

    with pytest.raises(UserError, match="the loss is nan .* at step 8; lower"):
        train(tmp_path, settings(log_every=100), bad_later)
    seen = []
    train(tmp_path, settings(), lambda step: (seen.append(step), batches(step))[1])
    assert seen[0] == 4  # not of step 8


def test_quiet_residuals_zero_only_the_named_kernels():
    layer = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    quiet = quiet_residuals({"block": {"conv1": layer, "conv2": layer}}, ("conv2",))["block"]
    assert float(quiet["conv2"]["kernel"].sum()) == 0
    assert float(quiet["conv2"]["bias"].sum()) == 2
    assert float(quiet["conv1"]["kernel"].sum()) == 2
