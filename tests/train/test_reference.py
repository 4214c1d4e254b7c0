"""A table of the base's errors takes the place of its pass, and changes nothing else."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax import sharding
from safetydpo_jax.data import batches, make_cache
from safetydpo_jax.errors import UserError
from safetydpo_jax.train import base, loop, reference
from safetydpo_jax.train.flops import step_flops
from safetydpo_jax.train.reference import reference_table
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import TrainState, make_optimizer
from safetydpo_jax.train.step import make_train_step

BETA = 5000.0  # the published one, at which rounding shows most


@pytest.fixture
def paper(config):
    config.recipe, config.loss.beta = "paper", BETA
    config.reference.draws = 3
    config.optimizer.learning_rate = 1e-3
    return resolve(config)


@pytest.fixture
def make(paper, small, tmp_path):
    """Makes the pairs' table on some devices; gives back the cache, it, and what was said."""
    cache = make_cache(paper, small, tmp_path, lambda line: None)

    def make(config=paper, devices=1, folder="run"):
        said, mesh = [], sharding.make_mesh(devices=jax.devices()[:devices])
        table = reference_table(config, small, cache, mesh, tmp_path / folder, "m", said.append)
        return cache, table, said

    return make


def train(small, config, cache, adapters, table, known, steps=20):
    """The losses of some steps, with what the table knows or without."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = make_train_step(small.unet, small.schedule, config, mesh)
    state = TrainState.create(jax.tree.map(jnp.copy, adapters), make_optimizer(config))
    losses = []
    for batch in itertools.islice(batches(cache, config, reference=table), steps):
        if not known:
            batch.pop("reference")
        state, metrics = step(state, small.unet_params, batch, cache.null)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def test_the_loss_curve_is_the_same(make, paper, small, adapters):
    cache, table, said = make()
    assert table.shape == (48, 3, 2)
    assert said[0] == "reference: 48 rows, 3 of 3 draws to be computed"
    with_table, without = (
        train(small, paper, cache, adapters, table, known) for known in (True, False)
    )
    np.testing.assert_allclose(with_table, without, rtol=1e-3)
    assert np.abs(np.diff(with_table)).max() > 0.1
    other = train(small, paper, cache, adapters, 1.01 * table, True)
    assert np.abs(other - without).max() > 0.1  # it is the table that is used


def test_draws_come_again_in_turn(make, paper):
    cache, table, _ = make()
    taken = list(itertools.islice(batches(cache, paper, reference=table), 24))  # four epochs
    rows, draws = (np.concatenate([b[k] for b in taken]) for k in ("row_id", "draw"))
    assert np.array_equal(draws, np.arange(192) // 48 % 3)
    known = np.concatenate([batch["reference"] for batch in taken])
    np.testing.assert_array_equal(known, table[rows, draws])


def test_it_does_not_depend_on_the_mesh(make):
    one, four = make()[1], make(devices=4, folder="other")[1]
    np.testing.assert_allclose(one, four, rtol=1e-6)


def test_computed_once_and_more_draws_go_on(make, paper, tmp_path):
    _, table, _ = make()
    assert make()[2] == []
    paper.reference.draws = 5
    _, more, said = make()
    assert said[0] == "reference: 48 rows, 2 of 5 draws to be computed"
    np.testing.assert_array_equal(more[:, :3], table)
    assert not np.array_equal(more[:, 3], table[:, 0])
    paper.loss.beta, paper.optimizer.learning_rate = 1.0, 1.0  # neither is the base's affair
    assert make()[2] == []
    paper.seed = 1
    assert not np.array_equal(make()[1][:, 0], table[:, 0])


def test_a_killed_computation_goes_on(make, paper, tmp_path, monkeypatch):
    write, whole = reference.write_tensors, make()[1]

    def killed(path, *rest):
        if path.name == "draw_00002.safetensors":
            raise KeyboardInterrupt
        write(path, *rest)

    paper.reference.path = str(tmp_path / "shared")
    monkeypatch.setattr(reference, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        make()
    monkeypatch.setattr(reference, "write_tensors", write)
    _, table, said = make()
    assert said[0] == "reference: 48 rows, 1 of 3 draws to be computed"
    np.testing.assert_array_equal(table, whole)


def test_rows_that_are_not_learnt_have_none(make, paper):
    paper.rows = "safe_prompt"
    table = make()[1]
    assert np.isnan(table[::2]).all()
    assert np.isfinite(table[1::2]).all()


def test_no_draws_no_table(make, paper):
    paper.reference.draws = 0
    assert make()[1] is None


def test_a_damaged_file(make, tmp_path):
    make()
    file = next((tmp_path / "run" / "reference").rglob("draw_00001.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"draw_00001\.safetensors: not a whole safetensors file"):
        make()


def test_a_pass_less_is_counted(paper, small):
    null = jax.tree.map(jnp.asarray, small.encode_negative([""]))
    null = jax.tree.map(lambda x: x[0], null)
    flops = []
    for draws in (0, 3):
        paper.reference.draws = draws
        flops.append(step_flops(small.unet, small.unet_params, (8, 8, 4), null, paper))
    assert 0.6 < flops[1] / flops[0] < 0.7


def test_recipes_that_need_predictions(config):
    config.reference.draws = 2
    with pytest.raises(UserError, match=r"config.reference.draws is 2: .* --config.recipe=paper"):
        resolve(config)


def test_mirror_images_need_even_draws(config):
    config.recipe, config.cache.flip, config.reference.draws = "paper", True, 3
    with pytest.raises(UserError, match=r"with mirror images .* it must be even"):
        resolve(config)


def test_a_run_with_a_table(config, small, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_pipeline", lambda *args, **options: small)
    config.recipe, config.reference.draws, config.steps = "paper", 2, 4
    said = []
    loop.run(config, tmp_path / "run", said.append)
    assert any(line.startswith("reference: ") for line in said)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(lines[0])["margin"]) < 1e-2
    config.reference.draws = 3
    with pytest.raises(UserError, match=r"made with reference\.draws = 2, but now it is 3"):
        loop.run(config, tmp_path / "run", said.append)
