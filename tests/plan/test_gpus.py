"""Plans for GPUs: what is counted, against what a step is given."""

import dataclasses

import jax
import pytest

from configs import all_experts, emoji_base, hate
from safetydpo_jax import plan, sharding
from safetydpo_jax.errors import UserError
from safetydpo_jax.plan import gpus
from safetydpo_jax.plan.programs import Planned
from safetydpo_jax.train.settings import resolve


@pytest.fixture
def config(model_folder):
    config = hate.get_config("sd15")
    config.model, config.batch_size, config.dtype = str(model_folder), 8, "bfloat16"
    return config


def test_what_is_counted(config):
    found = plan.of_training(config, "h100:2x2", 3.0, mfu=0.4)
    config.pairs.path = "."
    step = Planned(resolve(config), config.model, sharding.make_mesh(devices=jax.devices()[:4]))
    assert found["fits"] is None
    assert (found["chips"], found["pairs"]) == (4, 8 * 4)
    assert found["flops_per_chip"] == step.flops() / 4
    seconds = step.flops() / 4 / (0.4 * 989e12)
    assert found["estimated_step_seconds"] == pytest.approx(seconds)
    assert found["dollars"] == pytest.approx(2000 * seconds / 3600 * 4 * 3)
    *whole, batch, null = step.arguments()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((whole, null)))
    size += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) // 4
    assert found["bytes_per_chip"]["arguments"] == size


def test_weights_that_are_split(config):
    whole = plan.of_training(config, "h100:4")["bytes_per_chip"]["arguments"]
    config.mesh.fsdp = 2
    split = plan.of_training(config, "h100:4")["bytes_per_chip"]["arguments"]
    assert split < whole
    config.mesh.fsdp = 3
    with pytest.raises(UserError, match="data -1 x fsdp 3 x tensor 1 is not the 4 devices"):
        plan.of_training(config, "h100:4")


def test_what_cannot_fit(config, monkeypatch):
    small = dataclasses.replace(gpus.GPUS["h100"], memory=10**5)
    monkeypatch.setitem(gpus.GPUS, "h100", small)
    found = plan.of_training(config, "h100:4")
    assert found["fits"] is False
    text = "\n".join(plan.lines(found))
    assert "fits            NO" in text
    assert text.endswith("to make it fit: --config.mesh.fsdp=4, which splits the weights")


@pytest.mark.parametrize(
    ("dtype", "precision", "peak"),
    [
        ("bfloat16", "float32", 312e12),
        ("float32", "bfloat16", 156e12),
        ("float32", "float32", 19.5e12),
    ],
)
def test_the_peak_is_that_of_the_products_type(config, dtype, precision, peak):
    config.dtype, config.matmul_precision = dtype, precision
    found = plan.of_training(config, "a100:1", mfu=0.5)
    seconds = found["flops_per_chip"] / (0.5 * peak)
    assert found["estimated_step_seconds"] == pytest.approx(seconds)


def test_several_experts(model_folder, config):
    several = all_experts.get_config("sd15")
    several.model, several.batch_size, several.dtype = str(model_folder), 8, "bfloat16"
    found, one = (plan.of_training(x, "h100:2") for x in (several, config))
    assert found["config"] == "7 experts:sd15"
    assert found["flops_per_chip"] == 7 * one["flops_per_chip"]
    assert found["bytes_per_chip"]["arguments"] > one["bytes_per_chip"]["arguments"]


def test_a_config_without_an_expert():
    with pytest.raises(UserError, match="this config trains no expert"):
        plan.of_training(emoji_base.get_config(), "h100:8")


def test_batches_that_do_not_divide(config):
    found = plan.of_training(config, "a100:16")
    assert "--config.batch_size=16" in found["changed"]
    assert f"with {found['changed']}" in plan.lines(found)


@pytest.mark.parametrize("topology", ["h100", "h100:", "h100:0", "h100:8x", "h100:-1"])
def test_no_number_of_gpus(config, topology):
    with pytest.raises(UserError, match="give how many GPUs, as h100:8"):
        plan.of_training(config, topology)
