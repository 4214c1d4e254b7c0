"""Tables of the base's answers take the place of its pass, and change nothing else."""

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
from safetydpo_jax.train.reference import reference_tables
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import TrainState, make_optimizer
from safetydpo_jax.train.step import make_train_step, numbers_of

BETA = 5000.0  # the published one, at which rounding shows most


@pytest.fixture
def paper(config):
    config.recipe, config.loss.beta = "paper", BETA
    config.reference.draws = 3
    config.optimizer.learning_rate = 1e-3
    return resolve(config)


@pytest.fixture
def anchored(config):
    config.recipe, config.matmul_precision = "anchored", "float32"
    config.loss.winner_anchor, config.loss.preservation = 20.0, 200.0
    config.reference.draws = 4
    return resolve(config)


@pytest.fixture
def make(paper, small, tmp_path):
    """Makes the tables on some devices; gives back the cache, them, and what was said."""
    cache = make_cache(paper, small, tmp_path, lambda line: None)

    def make(config=paper, devices=1, folder="run"):
        said, mesh = [], sharding.make_mesh(devices=jax.devices()[:devices])
        tables = reference_tables(config, small, cache, mesh, tmp_path / folder, "m", said.append)
        return cache, tables, said

    return make


def train(small, config, cache, adapters, tables, known, steps=20):
    """The losses of some steps, with what the tables know or without."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = make_train_step(small.unet, small.schedule, config, mesh)
    state = TrainState.create(jax.tree.map(jnp.copy, adapters), make_optimizer(config))
    losses, numbers = [], numbers_of(config)
    rows = itertools.islice(batches(cache, config, reference=tables), steps)
    for i, batch in enumerate(rows):
        if not known:
            batch.pop("reference")
        state, metrics = step(state, small.unet_params, batch, cache.null, numbers(i))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def test_the_loss_curve_is_the_same(make, paper, small, adapters):
    cache, tables, said = make()
    assert {name: table.shape for name, table in tables.items()} == {"errors": (48, 3, 2)}
    assert said[0] == "reference: errors, 48 rows, 3 of 3 draws to be computed"
    with_table, without = (
        train(small, paper, cache, adapters, tables, known) for known in (True, False)
    )
    np.testing.assert_allclose(with_table, without, rtol=1e-3)
    assert np.abs(np.diff(with_table)).max() > 0.1
    other = train(small, paper, cache, adapters, {"errors": 1.01 * tables["errors"]}, True)
    assert np.abs(other - without).max() > 0.1  # it is the table that is used


def test_the_loss_curve_with_an_anchor_is_the_same(make, anchored, small, adapters):
    cache, tables, _ = make(anchored)
    picture = (8, 8, 4)
    assert {name: table.shape for name, table in tables.items()} == {
        "errors": (24, 4, 2),
        "wanted": (24, 4, 2, *picture),
        "preserved": (24 + cache.num_preserve, 4, *picture),
    }
    with_tables, without = (
        train(small, anchored, cache, adapters, tables, known) for known in (True, False)
    )
    np.testing.assert_allclose(with_tables, without, rtol=1e-3)
    for name in tables:  # each is used
        changed = tables | {name: 1.1 * tables[name]}
        other = train(small, anchored, cache, adapters, changed, True)
        assert np.abs(other - without).max() > 1e-2, name


def test_draws_come_again_in_turn(make, paper):
    cache, tables, _ = make()
    taken = list(itertools.islice(batches(cache, paper, reference=tables), 24))  # four epochs
    rows, draws = (np.concatenate([b[k] for b in taken]) for k in ("row_id", "draw"))
    assert np.array_equal(draws, np.arange(192) // 48 % 3)
    known = np.concatenate([batch["reference"]["errors"] for batch in taken])
    np.testing.assert_array_equal(known, tables["errors"][rows, draws])


def test_a_preserve_rows_answer_is_its_own(make, anchored):
    cache, tables, _ = make(anchored)
    for batch in itertools.islice(batches(cache, anchored, reference=tables), 24):
        rows, draws = (batch["preserve"][k] for k in ("row_id", "draw"))
        known = tables["preserved"][rows - 2 * cache.num_pairs, draws]
        np.testing.assert_array_equal(batch["reference"]["preserved"], known)
        assert (draws < 4).all()
        known = tables["wanted"][batch["row_id"] // 2, batch["draw"]]
        np.testing.assert_array_equal(batch["reference"]["wanted"], known)


def test_it_does_not_depend_on_the_mesh(make, anchored):
    one, four = make(anchored)[1], make(anchored, devices=4, folder="other")[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, four)


def test_computed_once_and_more_draws_go_on(make, paper, tmp_path):
    table = make()[1]["errors"]
    assert make()[2] == []
    paper.reference.draws = 5
    _, more, said = make()
    assert said[0] == "reference: errors, 48 rows, 2 of 5 draws to be computed"
    np.testing.assert_array_equal(more["errors"][:, :3], table)
    assert not np.array_equal(more["errors"][:, 3], table[:, 0])
    paper.loss.beta, paper.optimizer.learning_rate = 1.0, 1.0  # neither is the base's affair
    assert make()[2] == []
    paper.seed = 1
    assert not np.array_equal(make()[1]["errors"][:, 0], table[:, 0])


def test_only_what_changed_is_computed_anew(make, anchored):
    make(anchored)
    anchored.loss.preservation_lean = 0.0
    assert [line.split(",")[0] for line in make(anchored)[2]] == ["reference: preserved"] * 2
    anchored.loss.winner_anchor, anchored.loss.preservation = 0.0, 1.0
    assert make(anchored)[2] == []
    anchored.loss.caption_dropout = 0.5
    assert make(anchored)[2][0].startswith("reference: errors, 24 rows, 4 of 4")


def test_a_killed_computation_goes_on(make, paper, tmp_path, monkeypatch):
    write, whole = reference.write_tensors, make()[1]

    def killed(path, *rest):
        if path.name == "errors_00002.safetensors":
            raise KeyboardInterrupt
        write(path, *rest)

    paper.reference.path = str(tmp_path / "shared")
    monkeypatch.setattr(reference, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        make()
    monkeypatch.setattr(reference, "write_tensors", write)
    _, tables, said = make()
    assert said[0] == "reference: errors, 48 rows, 1 of 3 draws to be computed"
    np.testing.assert_array_equal(tables["errors"], whole["errors"])


def test_rows_that_are_not_learnt_have_none(make, paper):
    both = make()[1]["errors"]
    paper.rows = "safe_prompt"
    cache, tables, _ = make()
    np.testing.assert_allclose(tables["errors"], both[1::2], rtol=1e-5)
    batch = next(batches(cache, paper, reference=tables))
    known = tables["errors"][batch["row_id"] // 2, batch["draw"]]
    np.testing.assert_array_equal(batch["reference"]["errors"], known)


def test_no_draws_no_table(make, paper):
    paper.reference.draws = 0
    assert make()[1] is None


def test_a_damaged_file(make, tmp_path):
    make()
    file = next((tmp_path / "run" / "reference").rglob("errors_00001.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"errors_00001\.safetensors: not a whole safetensors file"):
        make()


def test_a_pass_less_is_counted(paper, small):
    null = jax.tree.map(jnp.asarray, small.encode_negative([""]))
    null = jax.tree.map(lambda x: x[0], null)
    flops = []
    for draws in (0, 3):
        paper.reference.draws = draws
        flops.append(step_flops(small.unet, small.unet_params, (8, 8, 4), null, paper))
    assert 0.6 < flops[1] / flops[0] < 0.7


def test_mirror_images_need_even_draws(config):
    config.recipe, config.cache.flip, config.reference.draws = "paper", True, 3
    with pytest.raises(UserError, match=r"with mirror images .* it must be even"):
        resolve(config)


@pytest.mark.parametrize("recipe", ["paper", "anchored"])
def test_a_run_with_tables(recipe, config, small, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_pipeline", lambda *args, **options: small)
    config.recipe, config.reference.draws, config.steps = recipe, 2, 4
    said = []
    loop.run(config, tmp_path / "run", said.append)
    assert any(line.startswith("reference: ") for line in said)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(lines[0])["margin"]) < 1e-2
    config.reference.draws = 4
    with pytest.raises(UserError, match=r"made with reference\.draws = 2, but now it is 4"):
        loop.run(config, tmp_path / "run", said.append)
