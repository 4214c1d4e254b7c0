"""One training, whatever the mesh: batches split over data and fsdp, parameters over the others."""

import json

import jax
import numpy as np
import pytest

from benchmarks import meshes
from safetydpo_jax import sharding
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import TrainState, make_optimizer
from safetydpo_jax.train.step import make_train_step, numbers_of
from tests.train.test_step import distance, draws

MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 1, 2)]


@pytest.fixture
def train(small, adapters, batch, null, config):
    """Twenty steps on a mesh; the first moments, the losses, and where the base's weights were."""
    config.batch_size, config.preserve_batch_size = len(batch["row_id"]), 32
    config = resolve(config)

    def train(data, fsdp, tensor):
        mesh = sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
        step = make_train_step(small.unet, small.schedule, config, mesh)
        places = sharding.param_shardings(mesh, small.unet_params, config.mesh.rules)
        base = jax.tree.map(sharding.put, small.unet_params, places)
        state = TrainState.create(adapters, make_optimizer(config))
        state = sharding.put(jax.device_get(state), sharding.replicated(mesh))
        first, losses, numbers = None, [], numbers_of(config)
        for i, rows in enumerate(draws(batch, 20)):
            state, metrics = step(state, base, sharding.put_rows(rows, mesh), null, numbers(i))
            first = first or jax.device_get(state.opt_state[1][0].mu)
            losses.append(float(metrics["loss"]))
        return first, losses, base

    return train


def test_every_mesh_trains_the_same(train):
    (gradient, losses, _), *others = [train(*mesh) for mesh in MESHES]
    assert abs(losses[-1] - losses[0]) > 1e-3 * losses[0]
    for mesh, (of_mesh, found, _) in zip(MESHES[1:], others, strict=True):
        assert distance(of_mesh, gradient) < 1e-5, mesh
        np.testing.assert_allclose(found, losses, rtol=1e-3, err_msg=str(mesh))


def test_weights_are_split_by_the_configs_rules(train):
    _, _, base = train(2, 2, 2)
    query, out = (base["attn2"][name]["kernel"] for name in ("to_q", "to_out.0"))
    assert query.sharding.spec == jax.P("fsdp", "tensor")
    assert out.sharding.spec == jax.P("tensor", "fsdp")
    assert query.addressable_data(0).size * 4 == query.size
    assert base["proj_in"]["kernel"].sharding.is_fully_replicated


def test_what_is_split_comes_whole_to_this_host():
    mesh = sharding.make_mesh(2, 2, 2)
    numbers = np.arange(64.0).reshape(8, 8)
    split = sharding.put(numbers, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
    same = sharding.put(numbers, sharding.replicated(mesh))
    for found in sharding.on_this_host([split, same], mesh):
        assert found.sharding.mesh.size == 8
        assert found.sharding.is_fully_replicated
        np.testing.assert_array_equal(found, numbers)
    copied, kept = (
        x.addressable_data(0).unsafe_buffer_pointer()
        for x in (sharding.on_this_host(same, mesh), same)
    )
    assert copied == kept


def test_rows_of_a_batch_go_where_the_shards_are():
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.own_batch_shards(mesh) == [0, 1, 2, 3]
    rows = sharding.put_rows({"x": np.arange(8.0)}, mesh)["x"]
    assert rows.sharding.spec == jax.P(("data", "fsdp"))
    np.testing.assert_array_equal(rows, np.arange(8.0))


def test_what_was_measured_is_the_same_training():
    """By benchmarks/meshes.py, with processes of their own, of which one is killed."""
    found = json.loads(meshes.RESULT.read_text())
    assert found["curves"].keys() == meshes.CURVES.keys()
    assert all(map(meshes.curve_is_same, found["curves"].values()))
    assert {row["processes"] for row in found["kills"]} == {2, 4}
    assert all(map(meshes.kill_is_nothing, found["kills"]))
    assert all(row["exit_codes"][row["killed"]] == -9 for row in found["kills"])
