"""Plans of real steps, compiled by the TPU compiler; and what is told where there is none."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from configs import all_experts, hate
from safetydpo_jax import plan, sharding
from safetydpo_jax.errors import UserError
from safetydpo_jax.models import attention
from safetydpo_jax.models.target import compiling_for
from safetydpo_jax.plan import chips, cost, estimate, training
from tests.diffusion.tiny_pipeline import write_tiny_pipeline

pytestmark = pytest.mark.usefixtures("optimised")

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: pip install 'safetydpo-jax[tpu]'",
)


@pytest.fixture
def config(model_folder):
    config = hate.get_config("sd15")
    config.model, config.dtype, config.batch_size = str(model_folder), "bfloat16", 8
    return config


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "safetydpo_jax" / "plans"


@compiler
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "v5p:4x4x4"])
@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"fsdp": 8}, {"tensor": 2}])
def test_axes_of_the_mesh_may_be_parts_of_the_slices(topology, axes):
    devices = plan.slice_of(topology)[1]
    mesh = sharding.make_mesh(devices=devices, **axes)
    assert {axis: mesh.shape[axis] for axis in axes} == axes
    assert set(mesh.devices.flat) == set(devices)


@compiler
def test_a_small_step_on_four_chips(config, cached, tmp_path):
    said = []
    found = plan.of_training(config, "v5e:2x2", 1.2, passes=False, progress=said.append)
    assert found["fits"]
    assert (found["chips"], found["pairs"]) == (4, 8 * 4)
    assert found["bytes_per_chip"]["all"] < 2**28
    assert found["loops_of_unknown_length"] == 0
    assert found["unknown_kernels"] == {}
    reduced = [x for x in found["collectives"] if x["kind"] == "all-reduce"]
    assert sum(x["bytes"] for x in reduced) >= 4 * 1376  # the adapters' gradients
    assert {x["chips"] for x in reduced} == {4}
    assert 0 < found["estimated_mfu"] < 1
    seconds = found["estimated_step_seconds"]
    assert found["dollars"] == pytest.approx(2000 * seconds / 3600 * 4 * 1.2)
    assert found["weak_scaling"][1] < found["weak_scaling"][256]
    text = "\n".join(plan.lines(found))
    assert "fits            yes" in text
    plan.draw(found, tmp_path / "split.png")
    with Image.open(tmp_path / "split.png") as picture:
        assert picture.size == (900, 190)

    said.clear()
    again = plan.of_training(config, "v5e:2x2", 1.2, passes=False, progress=said.append)
    assert again == found
    assert "compiled before" in said[1]


@compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "tensor", "kinds"), [(2, 1, {"all-gather", "all-reduce"}), (1, 2, {"all-reduce"})]
)
def test_a_small_step_whose_weights_are_split(config, cached, fsdp, tensor, kinds):
    config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
    config.accumulation = 2
    found = plan.of_training(config, "v5e:2x2", passes=False)
    inner = [x for x in found["collectives"] if x["chips"] == 2 and not x["over_data"]]
    assert kinds <= {x["kind"] for x in found["collectives"]}
    assert any(x["count"] % 2 == 0 for x in inner)  # of each of the two turns
    assert found["pairs"] == 16
    assert list(found["weak_scaling"]) == [4, 16, 64, 256]


@compiler
@pytest.mark.slow
def test_a_small_step_of_sdxl_with_known_reference(tmp_path, cached):
    config = hate.get_config("sdxl")
    config.model = str(write_tiny_pipeline(tmp_path / "sdxl", "sdxl"))
    config.recipe, config.batch_size, config.preserve_batch_size = "anchored", 4, 4
    config.reference.draws = 2
    assert plan.of_training(config, "v5e:2x2", passes=False)["fits"]


COPY = """\
HloModule jit_f, num_partitions=4

ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} copy(%a), backend_config={"estimated_cycles":"1500"}
}
"""


class Compiled:
    """A program of one instruction, which was compiled."""

    argument_size_in_bytes = temp_size_in_bytes = output_size_in_bytes = 2**20
    alias_size_in_bytes = generated_code_size_in_bytes = 0

    def as_text(self):
        return COPY

    def compile(self):
        return self

    def memory_analysis(self):
        return self


def test_what_was_compiled_is_read_anew(cached, monkeypatch):
    """What is kept does not depend on how it is read, which may have changed since."""
    chip = chips.CHIPS["v5e"]
    first = estimate.compiled_for(Compiled(), "v5e:2x2", chip, lambda line: None)
    assert first["cycles"] == {"other": 1500}
    assert first["bytes_per_chip"]["all"] == 3 * 2**20
    monkeypatch.setattr(cost, "KINDS", (("copy", re.compile("")),))
    smaller = dataclasses.replace(chip, memory=2**20)
    monkeypatch.setattr(Compiled, "compile", None)
    again = estimate.compiled_for(Compiled(), "v5e:2x2", smaller, lambda line: None)
    assert again["cycles"] == {"copy": 1500}
    assert not estimate.estimate(again, smaller, {"data": 4}, 8, 1e9)["fits"]


def test_a_cache_that_cannot_be_written_is_told_before(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    monkeypatch.setattr(Compiled, "compile", None)
    with pytest.raises(UserError, match="could not write /proc/"):
        estimate.compiled_for(Compiled(), "v5e:2x2", chips.CHIPS["v5e"], lambda line: None)


@compiler
def test_the_attention_kernel_in_bfloat16_whatever_precision_is_asked():
    """A kernel whose products of bfloat16 were to be float32's would not compile."""
    _, devices = chips.slice_of("v5e:2x2")
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((1, 1024, 1, 40), jnp.bfloat16, sharding=one)

    def loss(q, k, v):
        return attention.dot_product_attention(q, k, v).astype(jnp.float32).sum()

    with compiling_for("tpu"), jax.default_matmul_precision("float32"):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count("tpu_custom_call") >= 2  # forward, and the gradient


@compiler
def test_slices_that_are_not(config):
    for topology in ("v5e:3x3", "v5e:two"):
        with pytest.raises(UserError, match=f"--topology {topology}: "):
            chips.slice_of(topology)


@pytest.mark.parametrize(
    ("given", "shards", "fitted", "said"),
    [
        ((8, 4, 0), 4, (8, 4, 0), ""),
        (
            (6, 4, 0),
            4,
            (8, 3, 0),
            "--config.batch_size=8 --config.accumulation=3, so that batches divide over 4",
        ),
        (
            (4, 4, 0),
            256,
            (256, 1, 0),
            "--config.batch_size=256 --config.accumulation=1, so that batches divide over 256; an "
            "update has 256 pairs and not 16",
        ),
        # Four turns of 6 preserve rows are three of 8.
        (
            (6, 4, 6),
            4,
            (8, 3, 8),
            "--config.batch_size=8 --config.accumulation=3 --config.preserve_batch_size=8, so that "
            "batches divide over 4",
        ),
        (
            (8, 1, 6),
            4,
            (8, 1, 8),
            "--config.preserve_batch_size=8, so that batches divide over 4; an update has 8 "
            "preserve rows and not 6",
        ),
    ],
)
def test_batches_are_made_to_divide(config, given, shards, fitted, said):
    keys = ("batch_size", "accumulation", "preserve_batch_size")
    config.update(dict(zip(keys, given, strict=True)))
    assert training._fit_batch(config, shards) == said
    assert tuple(config[key] for key in keys) == fitted


@pytest.mark.parametrize(
    ("given", "shards", "turns"),
    [
        ((16, 1, 0), 4, "--config.batch_size=8 --config.accumulation=2, the same update"),
        ((12, 2, 0), 4, "--config.batch_size=4 --config.accumulation=6, the same update"),
        (
            (16, 1, 24),
            4,
            "--config.batch_size=8 --config.preserve_batch_size=12 --config.accumulation=2, the "
            "same update",
        ),
        ((16, 1, 12), 4, None),  # 4 and 3 rows a chip: no turns are equal
        ((4, 4, 0), 4, None),
    ],
)
def test_turns_that_are_the_same_update(config, given, shards, turns):
    config.dtype, config.remat, config.mesh.fsdp = "bfloat16", True, 2
    config.batch_size, config.accumulation, config.preserve_batch_size = given
    found = training._remedies(config, 8, shards)
    assert found == [turns or "a slice whose chips have more memory"]


def test_weights_are_split_over_what_divides_the_chips(config):
    config.dtype, config.remat, config.batch_size = "bfloat16", True, 12
    config.mesh.tensor, config.mesh.data = 2, 6
    [found] = training._remedies(config, 12, 12)
    assert found == "--config.mesh.fsdp=2 --config.mesh.data=-1, which splits the weights"


def test_experts_that_share_a_step_and_such_that_do_not():
    config = all_experts.get_config("sd15")
    one, count = training._one_step(config)
    assert (one.batch_size, count) == (4, 7)
    config.experts.hate.steps = 3
    with pytest.raises(UserError, match="these experts have 2 different settings"):
        training._one_step(config)


def test_unknown_chips():
    with pytest.raises(UserError, match="--topology is 'v4:2x2': give one of v5e, v5p, v6e"):
        chips.slice_of("v4:2x2")


def test_no_compiler(monkeypatch):
    from jax.experimental import topologies

    def missing(**options):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"no TPU compiler here .* pip install 'safetydpo-jax\[tpu"):
        chips.slice_of("v5e:2x2")


class TooLarge:
    """A program that the compiler finds no place for."""

    def __init__(self, said):
        self.said = said

    def as_text(self):
        return self.said

    def compile(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.said}")


@compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_program_that_is_really_too_large(topology, cached):
    """The compiler says how much memory there is, and what this package knows is that."""
    chip, devices = chips.slice_of(topology)
    assert devices[0].num_cores == chip.cores
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32, sharding=one)
    lowered = jax.jit(lambda x: (x @ x).sum()).trace(x).lower(lowering_platforms=("tpu",))
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"HBM \({chip.memory / 2**30:.2f}G\)"):
        lowered.compile()
    found = estimate.compiled_for(lowered, topology, chip, lambda line: None)
    assert found["bytes_per_chip"]["all"] >= 2**38
    assert not estimate.estimate(found, chip, {"data": 1}, 1, 1e12)["fits"]


@compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compilers_cycles_are_those_of_the_peak(topology):
    """A large product takes few more than all units together would, of both cores of a v5p."""
    chip, devices = chips.slice_of(topology)
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=one)
    lowered = jax.jit(lambda x: x @ x).trace(x).lower(lowering_platforms=("tpu",))
    cycles = cost.cost_of(lowered.compile().as_text(), chip).cycles.total()
    assert 0.8 < 4096**3 / cycles / (chip.units * chip.side**2) < 1


def test_another_memory_that_is_full(cached):
    full = TooLarge("Allocation of 20.0M in memory space=vmem")
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        estimate.compiled_for(full, "v5e:2x2", chips.CHIPS["v5e"], lambda line: None)


def test_models_that_are_not_at_hand(config):
    config.model = "no/such"
    with pytest.raises(UserError, match="config.model is no/such: there is no such folder"):
        training._checkpoint(config)
    assert training._checkpoint(hate.get_config("sd21")).endswith("sd21-768")


def test_what_does_not_fit(config, cached):
    chip = chips.CHIPS["v5e"]
    said = "Ran out of memory in memory space hbm. Used 17.30G of 15.75G hbm."
    found = estimate.compiled_for(TooLarge(said), "v5e:2x2", chip, lambda line: None)
    result = estimate.estimate(found, chip, {"data": 4}, 32, 1e12)
    assert not result["fits"]
    assert result["bytes_per_chip"]["all"] == round(17.3 * 2**30)
    config.dtype, config.remat, config.batch_size = "float32", False, 16
    config.preserve_batch_size = 0
    remedies = training._remedies(config, 4, 4)
    shown = {
        "config": "hate:sd15",
        "changed": "",
        "pairs": 32,
        "chips": 4,
        "chip": "v5e",
        "remedies": remedies,
    }
    text = "\n".join(plan.lines(result | shown))
    assert "fits            NO" in text
    assert "17.30 of 15.75 GiB" in text
    assert "--config.dtype=bfloat16; --config.remat=true; --config.batch_size=8" in text


def collective(kind, chips, over_data, size):
    return {"kind": kind, "chips": chips, "over_data": over_data, "count": 1, "bytes": size}


def test_sending_takes_its_share_of_the_group():
    sent = [
        collective("all-reduce", 4, True, 200e9),
        collective("all-gather", 2, False, 100e9),
        collective("collective-permute", 2, False, 20e9),
    ]
    # Over links of 200 GB a second.
    assert estimate.sending_seconds(sent, chips.CHIPS["v5e"]) == pytest.approx(1.5 + 0.25 + 0.1)
    found = estimate.sending_seconds(sent, chips.CHIPS["v5e"], 4)
    assert found == pytest.approx(2 * 15 / 16 + 0.25 + 0.1)


def test_other_slices_have_a_longer_data_axis_alone():
    found = {
        "bytes_per_chip": {"all": 1, "memory": 2},
        "cycles": {"other": 1.5e9},
        "collectives": [
            collective("all-reduce", 4, True, 200e9),
            collective("all-gather", 2, False, 200e9),
        ],
    }
    chip = chips.CHIPS["v5e"]
    mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    scaling = estimate.estimate(found, chip, mesh, 8, 1e12)["weak_scaling"]
    assert list(scaling) == [4, 16, 64, 256]
    assert scaling[16] == pytest.approx(1 + 2 * 15 / 16 + 0.5)
    # Nothing was compiled of what a data axis would send.
    mesh = {"data": 1, "fsdp": 4, "tensor": 1}
    assert list(estimate.estimate(found, chip, mesh, 8, 1e12)["weak_scaling"]) == [4]
    found["collectives"] = [collective("collective-permute", 2, False, 200e9)]
    scaling = estimate.estimate(found, chip, {"data": 4}, 8, 1e12)["weak_scaling"]
    assert (scaling[1], scaling[16]) == (1, 2)  # one chip sends nothing
