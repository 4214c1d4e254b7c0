from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from safetydpo_jax import lora, sharding
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.train.noise import noisy_rows, row_keys
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import TrainState, learning_rate, make_optimizer
from safetydpo_jax.train.step import make_loss, make_train_step, numbers_of, part_names


def mesh_of(count):
    return sharding.make_mesh(devices=jax.devices()[:count])


def train(small, config, adapters, batches, null, devices=1):
    """The state and the metrics after each of these batches."""
    mesh = mesh_of(devices)
    step = make_train_step(small.unet, small.schedule, config, mesh)
    state = TrainState.create(jax.tree.map(jnp.copy, adapters), make_optimizer(config))
    state = jax.device_put(state, sharding.replicated(mesh))
    base = jax.device_put(small.unet_params, sharding.replicated(mesh))
    numbers = numbers_of(config)
    states, history = [], []
    for i, batch in enumerate(batches):
        state, metrics = step(state, base, batch, null, numbers(i))
        states.append(jax.tree.map(np.array, state))  # a copy: the next step takes the buffers
        history.append(jax.device_get(metrics))
    return states, history


def draws(batch, count):
    """The same rows, each time drawn anew."""
    return [{**batch, "draw": batch["draw"] + np.uint32(i)} for i in range(count)]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def distance(x, y):
    """Relative difference of two trees, by norm."""
    x, y = flat(x), flat(y)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def one_step(config, small, adapters, batch, null, devices=1):
    """The gradient of a step, of which Adam's first moment is the share 1 - b1, and its metrics."""
    config.optimizer.clip_norm = 1e9
    config = resolve(config)
    [state], [metrics] = train(small, config, adapters, [batch], null, devices)
    return jax.tree.map(lambda x: x / (1 - config.optimizer.b1), state.opt_state[1][0].mu), metrics


@pytest.mark.parametrize(
    ("recipe", "preference", "at_zero"),
    [
        ("paper", "dpo", np.log(2)),
        ("anchored", "dpo", np.log(2)),
        ("paper", "ipo", 0.25),
        ("paper", "hinge", 1.0),
        ("anchored", "winner_preserving", np.log(2)),
    ],
)
def test_policy_is_the_reference_at_the_start(
    recipe, preference, at_zero, config, small, batch, null
):
    config.recipe, config.batch_size, config.preserve_batch_size = recipe, 32, 32
    config.loss.beta, config.loss.preference = 5000.0, preference
    config = resolve(config)
    adapters = lora.init_adapters(
        jax.random.key(0), small.unet_params, rank=2, targets=config.lora.targets
    )
    _, [metrics] = train(small, config, adapters, [batch], null)
    assert abs(metrics["margin"]) < 1e-3
    assert abs(metrics["preference_loss"] - at_zero) < 1e-3
    assert metrics["grad_norm"] > 0
    if preference == "winner_preserving":
        assert 0 < metrics.pop("loser_scale") <= 1
    assert "loser_scale" not in metrics
    for term in ("preservation", "winner_anchor"):
        assert (term in metrics) == (recipe == "anchored")


@pytest.mark.usefixtures("optimised")
def test_a_batch_in_half_precision_is_computed_with_in_full(config, small, adapters, batch, null):
    def to(tree, dtype):
        floats = lambda x: np.issubdtype(x.dtype, np.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, tree)

    config.recipe, config.batch_size, config.preserve_batch_size = "anchored", 32, 32
    half = to(batch, np.float16)
    gradients = [
        one_step(config, small, adapters, x, null)[0] for x in (half, to(half, np.float32))
    ]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_training_prefers_the_winner(config, small, adapters, batch, null):
    config.recipe, config.batch_size = "paper", 32
    config.optimizer.learning_rate = 1e-2
    config.loss.beta = 50.0
    config = resolve(config)
    _, history = train(small, config, adapters, draws(batch, 25), null)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert history[-1]["margin"] > history[0]["margin"]
    assert history[-1]["winner_error"] < history[-1]["loser_error"]


def test_a_base_in_bfloat16_has_the_same_gradient_but_for_its_rounding(
    config, model_folder, batch, null
):
    """What is left of the difference is what 8 bits of mantissa make of it; adapters keep 24."""
    gradients = []
    for dtype in ("float32", "bfloat16"):
        pipeline = load_pipeline(model_folder, dtype)
        adapters = lora.init_adapters(
            jax.random.key(0), pipeline.unet_params, rank=2, targets=config.lora.targets
        )
        own = config.copy_and_resolve_references()
        own.batch_size = own.preserve_batch_size = 32
        gradient, metrics = one_step(own, pipeline, adapters, batch, null)
        assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        assert abs(metrics["margin"]) < 0.02  # beta is 50; 0 if both were rounded alike
        gradients.append(gradient)
    assert 1e-4 < distance(gradients[1], gradients[0]) < 0.2


def config_of(config, size, accumulation=1):
    # Adam makes steps of the whole rate out of gradients that are all rounding: keep it moderate.
    config.optimizer.learning_rate = 2e-3
    config.batch_size = config.preserve_batch_size = size
    config.accumulation = accumulation
    return resolve(config)


@pytest.fixture(scope="module")
def one_big_batch(small, adapters, batch, null):
    """Twenty steps on one device, 32 rows at once."""
    config = common.get_config("hate")
    config.lora.rank, config.optimizer.warmup_steps = 2, 2
    config = config_of(config, 32)
    return train(small, config, adapters, draws(batch, 20), null)


@pytest.mark.parametrize(("devices", "size", "accumulation"), [(8, 32, 1), (1, 8, 4)])
def test_devices_and_accumulation_change_nothing(
    devices, size, accumulation, config, small, adapters, batch, null, one_big_batch
):
    config = config_of(config, size, accumulation)
    states, _ = train(small, config, adapters, draws(batch, 20), null, devices)
    expected, _ = one_big_batch
    # Adam's first moment after one step is the clipped gradient times 1 - b1.
    assert distance(states[0].opt_state[1][0].mu, expected[0].opt_state[1][0].mu) < 1e-5
    assert distance(states[-1].adapters, expected[-1].adapters) < 1e-3
    assert distance(expected[-1].adapters, adapters) > 1e-2


@pytest.fixture(scope="module")
def strong_losers(batch):
    """The batch with losers so far out that their gradient is the stronger."""
    return {**batch, "loser": {**batch["loser"], "mean": 5 * batch["loser"]["mean"]}}


@pytest.fixture(scope="module")
def apart(small, adapters, strong_losers, null):
    """Flat gradients: through the winner, through the loser, of other terms; and DPO's, whole."""
    config = common.get_config("hate")
    config.lora.rank = 2
    gradients = []
    for preference in ("winner_preserving", "dpo"):
        config.loss.preference = preference
        loss = make_loss(small.unet, small.schedule, resolve(config), mesh_of(1))
        gradient_of = jax.jit(jax.jacrev(loss, has_aux=True))
        numbers = numbers_of(resolve(config))(0)
        parts, _ = gradient_of(adapters, small.unet_params, strong_losers, null, numbers)
        gradients += [parts[name] for name in part_names(resolve(config))]
    return [flat(tree) for tree in gradients]


def test_the_parts_add_up_to_dpo(apart):
    winner, loser, others, whole = apart
    assert distance(winner + loser + others, whole) < 1e-5
    assert min(distance(x + y, whole) for x, y in combinations(apart[:3], 2)) > 1e-2


@pytest.mark.parametrize(("devices", "size", "accumulation"), [(1, 32, 1), (8, 32, 1), (1, 8, 4)])
def test_the_losers_scale_is_of_the_whole_batch(
    devices, size, accumulation, config, small, adapters, strong_losers, null, apart
):
    winner, loser, others, _ = apart
    scale = winner @ winner / -(winner @ loser)
    assert 0 < scale < 0.9
    config.loss.preference = "winner_preserving"
    config.batch_size = config.preserve_batch_size = size
    config.accumulation = accumulation
    gradient, metrics = one_step(config, small, adapters, strong_losers, null, devices)
    np.testing.assert_allclose(metrics["loser_scale"], scale, rtol=1e-4)
    assert distance(gradient, winner + scale * loser + others) < 1e-5


def test_winner_preserving_leaves_the_winner(config, small, adapters, strong_losers, null):
    """Where a small step of DPO's makes the winner's error rise, this one's does not."""
    beta = 50.0
    config.recipe, config.loss.beta, config.batch_size = "paper", beta, 32
    config.loss.caption_dropout = 0.0
    rows = noisy_rows(
        row_keys(jax.random.key(config.seed), strong_losers["row_id"], strong_losers["draw"]),
        [strong_losers["winner"], strong_losers["loser"]],
        strong_losers["conditioning"],
        null,
        small.schedule,
        t_min=0,
        t_max=1000,
        caption_dropout=0.0,
    )

    @jax.jit
    def errors(adapters):
        """Of each row's winner and loser."""
        variables = {"params": small.unet_params, "lora": lora.scaled(adapters, 2.0, 2)}
        outputs = [
            small.unet.apply(variables, x, rows.timesteps, *rows.conditioning) for x in rows.latents
        ]
        return jnp.square(jnp.stack(outputs) - jnp.stack(rows.targets)).mean((2, 3, 4))

    excess = errors(adapters) - errors(jax.tree.map(jnp.zeros_like, adapters))
    margin = -beta / 2 * (excess[0] - excess[1])
    weights = 1 / (1 + np.exp(margin))

    def rises(preference):
        """How fast DPO's weighted errors of winner and loser rise along the step."""
        config.loss.preference = preference
        gradient, _ = one_step(config, small, adapters, strong_losers, null)
        size = 1e-2 / np.linalg.norm(flat(gradient))
        back, ahead = (
            errors(jax.tree.map(lambda x, g, s=s: x - s * g, adapters, gradient))
            for s in (-size, size)
        )
        return (ahead - back) @ weights / (2 * size)

    winner, loser = rises("dpo")
    assert 0 < winner < loser
    kept, loser = rises("winner_preserving")
    assert abs(kept) < 1e-2 * winner
    assert loser > 0


def test_noise_belongs_to_the_row(small, batch, null):
    @jax.jit
    def draw(rows):
        return noisy_rows(
            row_keys(jax.random.key(3), rows["row_id"], rows["draw"]),
            [rows["winner"], rows["loser"]],
            rows["conditioning"],
            null,
            small.schedule,
            t_min=100,
            t_max=900,
            caption_dropout=0.5,
            text_noise=0.25,
        )

    def rows_of(order, later=0):
        part = jax.tree.map(lambda x: x[order], {k: batch[k] for k in batch if k != "preserve"})
        return draw(part | {"draw": part["draw"] + np.uint32(later)})

    everything, order = rows_of(np.arange(32)), np.array([17, 3, 30, 4])
    for whole, part in zip(
        jax.tree.leaves(everything), jax.tree.leaves(rows_of(order)), strict=True
    ):
        np.testing.assert_allclose(whole[order], part, atol=1e-6)
    t = everything.timesteps
    assert ((t >= 100) & (t < 900)).all()
    assert len(np.unique(t)) > 16
    states = everything.conditioning.prompt_embeds
    dropped = (states == 0).all((1, 2))
    assert 4 < dropped.sum() < 28
    np.testing.assert_array_equal(dropped, everything.dropped)
    added = (states - batch["conditioning"].prompt_embeds)[~dropped]
    np.testing.assert_allclose([added.std(), added.mean()], [0.25, 0.0], atol=0.03)
    # Winner and loser share the noise, so that only their latents tell them apart.
    noise = [
        small.schedule.to_x0_and_noise(target, x, t)[1]
        for x, target in zip(everything.latents, everything.targets, strict=True)
    ]
    np.testing.assert_allclose(*noise, atol=1e-3)
    # Each kind of noise is its own: what is added to a prompt says nothing of the picture's.
    picture_noise = np.asarray(noise[0][~dropped]).reshape(len(added), -1)[:, : added[0].size]
    assert abs(np.corrcoef(added.ravel(), picture_noise.ravel())[0, 1]) < 0.15
    redrawn = rows_of(np.arange(32), later=1)
    assert not np.array_equal(redrawn.timesteps, t)


def test_captions_lean_either_way(small, batch, null):
    keys = row_keys(jax.random.key(3), batch["row_id"], batch["draw"])
    rows = noisy_rows(
        keys,
        [batch["winner"]],
        batch["conditioning"],
        null,
        small.schedule,
        t_min=0,
        t_max=1000,
        caption_dropout=0.1,
        lean=jax.tree.map(lambda x: jnp.float32(0.5) * x, batch["preserve"]["harm"]),
    )
    states = rows.conditioning.prompt_embeds
    added = (states - batch["conditioning"].prompt_embeds)[~rows.dropped]
    shares = added / (0.5 * batch["preserve"]["harm"].prompt_embeds[~rows.dropped])
    np.testing.assert_allclose(shares, shares[:, :1, :1] + 0 * shares, atol=1e-2)
    shares = np.median(shares, axis=(1, 2))
    assert -1 <= shares.min() < -0.6
    assert 0.6 < shares.max() <= 1
    assert abs(np.corrcoef(shares, rows.timesteps[~rows.dropped])[0, 1]) < 0.5
    assert rows.dropped.any()
    assert (np.asarray(states[rows.dropped]) == 0).all()


def test_other_numbers_are_no_other_program(config, small, batch, adapters, null):
    """A sweep over them, and over schedules and lengths, is compiled once."""
    assert resolve(config).optimizer.schedule == "constant"
    texts = set()
    for key, value in (
        ("seed", config.seed),
        ("loss.beta", 7.0),
        ("loss.preservation", 3.0),
        ("loss.winner_anchor", 2.0),
        ("optimizer.learning_rate", 1e-6),
        ("optimizer.schedule", "cosine"),
        ("optimizer.warmup_steps", 0),
        ("steps", 7),
    ):
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict({key: value})
        own = resolve(own)
        step = make_train_step(small.unet, small.schedule, own, mesh_of(1))
        state = TrainState.create(adapters, make_optimizer(own))
        lowered = step.lower(state, small.unet_params, batch, null, numbers_of(own)(0))
        texts.add(lowered.as_text())
    assert len(texts) == 1


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_numbers_of_each_step(schedule, config):
    config.optimizer.schedule, config.steps = schedule, 50
    config = resolve(config)
    rate, numbers = learning_rate(config), numbers_of(config)
    for step in (0, 5, 19, 20, 21, 49):
        told = numbers(step)
        np.testing.assert_allclose(told.learning_rate, rate(step), rtol=1e-6, atol=1e-12)
        loss = config.loss
        assert told[1:] == (loss.beta, loss.preservation, loss.winner_anchor)
    assert {x.dtype for x in numbers(0)} == {np.dtype(np.float32)}


def test_what_is_preserved(config, small, adapters, batch, null):
    """The base's predictions at all timesteps, on prompts with noise that lean."""
    config.loss.preservation_text_noise, config.loss.preservation_lean = 0.4, 0.8
    config = resolve(config)
    loss = make_loss(small.unet, small.schedule, config, mesh_of(1))
    _, metrics = loss(adapters, small.unet_params, batch, null, numbers_of(config)(0))
    preserve = batch["preserve"]
    rows = noisy_rows(
        row_keys(jax.random.key(config.seed), preserve["row_id"], preserve["draw"]),
        [preserve],
        preserve["conditioning"],
        null,
        small.schedule,
        t_min=0,
        t_max=1000,
        caption_dropout=config.loss.preservation_dropout,
        text_noise=0.4,
        lean=jax.tree.map(lambda x: jnp.float32(0.8) * x, preserve["harm"]),
    )
    inputs = rows.latents[0], rows.timesteps, *rows.conditioning
    lora_of = lora.scaled(adapters, config.lora.alpha, config.lora.rank)
    base = small.unet.apply({"params": small.unet_params}, *inputs)
    policy = small.unet.apply({"params": small.unet_params, "lora": lora_of}, *inputs)
    expected = np.mean(np.square(policy - base))
    np.testing.assert_allclose(metrics["preservation"], expected, rtol=1e-4)


def test_each_term_has_its_weight(config, one_big_batch):
    weights = resolve(config).loss
    for terms in one_big_batch[1]:
        expected = (
            terms["preference_loss"]
            + weights.winner_anchor * terms["winner_anchor"]
            + weights.preservation * terms["preservation"]
        )
        np.testing.assert_allclose(terms["loss"], expected, rtol=1e-6)
        assert terms["preservation"] > 0


def test_the_anchor_is_the_winners_prompt(config, small, adapters, batch, null):
    """On both pictures, and under the empty prompt where the row's own was dropped."""
    config.loss.caption_dropout = 0.5
    config = resolve(config)
    loss = make_loss(small.unet, small.schedule, config, mesh_of(1))
    _, metrics = loss(adapters, small.unet_params, batch, null, numbers_of(config)(0))
    keys = row_keys(jax.random.key(config.seed), batch["row_id"], batch["draw"])
    settings = {k: config.loss[k] for k in ("t_min", "t_max", "caption_dropout")}
    rows = noisy_rows(
        keys,
        [batch["winner"], batch["loser"]],
        batch["conditioning"],
        null,
        small.schedule,
        **settings,
    )
    assert 4 < rows.dropped.sum() < 28
    states = batch["winner_conditioning"].prompt_embeds
    prompts = jnp.where(rows.dropped[:, None, None], 0.0, states)
    lora_of = lora.scaled(adapters, config.lora.alpha, config.lora.rank)
    errors = []
    for x in rows.latents:
        wanted = small.unet.apply({"params": small.unet_params}, x, rows.timesteps, prompts)
        found = small.unet.apply(
            {"params": small.unet_params, "lora": lora_of}, x, rows.timesteps, *rows.conditioning
        )
        errors.append(np.mean(np.square(found - wanted)))
    np.testing.assert_allclose(metrics["winner_anchor"], np.mean(errors), rtol=1e-4)


def test_a_batch_that_does_not_divide(config, small):
    config.batch_size = 12
    with pytest.raises(UserError, match=r"batch_size is 12, .* over 8 devices: use 8 or 16"):
        make_train_step(small.unet, small.schedule, resolve(config), mesh_of(8))


def test_an_empty_timestep_range(config, small):
    config.loss.t_min, config.loss.t_max = 600, 600
    with pytest.raises(UserError, match=r"t_min is 600 and t_max 600"):
        make_train_step(small.unet, small.schedule, resolve(config), mesh_of(1))
