"""Votes against a count by hand, one layer and one expert at a time; their file and its errors."""

import dataclasses
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from safetydpo_jax import lora
from safetydpo_jax.diffusion.samplers import SAMPLERS, advance, initial_latents
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.merge import activity, opened_experts
from safetydpo_jax.merge.activity import count_votes
from safetydpo_jax.merge.counted import Counted
from safetydpo_jax.merge.statistics import Statistics, load_statistics
from tests.merge.conftest import write_expert

PROMPTS = ["a", "b c", "d", "e f", "g", "h", "i j", "k"]
OF = ["hate", "hate", "sexual", "sexual", "hate", "hate", "sexual", "sexual"]
SETTINGS = {"num_steps": 4, "guidance_scale": 3.0, "batch_size": 8, "progress": lambda line: None}
LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    "down_blocks.0.resnets.0.conv1",
)


@pytest.fixture(scope="module")
def statistics(kept_files, pipeline):
    with opened_experts(kept_files, pipeline.unet_params) as experts:
        return count_votes(pipeline, experts, PROMPTS, OF, **SETTINGS)


def output_of(pipeline, layer, inputs, adapters=None):
    """What one layer puts out in the UNet."""
    variables = {"params": pipeline.unet_params} | ({"lora": adapters} if adapters else {})
    # Not compiled: it would be for every layer and rank anew.
    _, kept = pipeline.unet.apply(variables, *inputs, capture_intermediates=True)
    flat = traverse_util.flatten_dict(kept["intermediates"])
    [found] = [v for path, (v, *_) in flat.items() if ".".join(path[:-1]) == layer]
    return np.asarray(found)


def by_hand(pipeline, files, layer):
    """(half, category, band, expert, out), along the base's own drawing."""
    experts = [
        traverse_util.flatten_dict(lora.load_lora(x, pipeline.unet_params)[0]) for x in files
    ]
    alone = [
        traverse_util.unflatten_dict(
            {path: leaf for path, leaf in flat.items() if ".".join(path[:-1]) == layer}
        )
        for flat in experts
    ]
    told, negative = jax.tree.map(
        jnp.asarray, (pipeline.encode_prompts(PROMPTS), pipeline.encode_negative([""] * 8))
    )
    seeds = np.random.SeedSequence(0).generate_state(8)
    table = SAMPLERS["ddim"](pipeline.schedule, 4)
    x = initial_latents(seeds, pipeline.latent_shape)
    carry, rows, counts = (x, 0 * x), table.rows(), None
    for step in range(4):
        row = jax.tree.map(lambda column, step=step: column[step], rows)
        timesteps = jnp.full(8, row["timesteps"])
        inputs = (carry[0], timesteps, *told)
        base = output_of(pipeline, layer, inputs)
        change = [
            np.abs(output_of(pipeline, layer, inputs, x) - base) if x else 0 * base for x in alone
        ]
        best = np.argmax(change, 0).reshape(8, -1, base.shape[-1])
        if counts is None:
            counts = np.zeros((2, 2, 4, len(files), base.shape[-1]))
        for i, category in enumerate(OF):
            half = OF[:i].count(category) % 2
            for expert in range(len(files)):
                votes = (best[i] == expert).sum(0)
                counts[half, ["hate", "sexual"].index(category), step, expert] += votes
        answer, away = (
            pipeline.unet.apply({"params": pipeline.unet_params}, *inputs[:2], *x)
            for x in (told, negative)
        )
        carry = advance(row, carry, away + 3.0 * (answer - away))
    return counts


@pytest.mark.parametrize("layer", LAYERS)
def test_votes_against_a_count_by_hand(statistics, pipeline, files, layer):
    counts = statistics.outputs[layer]
    wanted = by_hand(pipeline, files, layer)
    assert counts.shape == wanted.shape
    assert counts.sum() == wanted.sum()
    # Rounding decides where two are as good as equal.
    assert np.abs(counts - wanted).sum() <= 0.01 * wanted.sum()
    shares = counts.sum((0, 1, 2)) / counts.sum((0, 1, 2, 3))
    assert (shares.max(0) < 1).any()  # it is no walkover
    assert statistics.categories == ["hate", "sexual"]


def test_batches_and_devices_change_nothing(statistics, files, pipeline):
    """Neither does a batch that is not full."""
    settings = SETTINGS | {"batch_size": 16}
    with opened_experts(files, pipeline.unet_params) as experts:
        other = count_votes(pipeline, experts, PROMPTS[:6], OF[:6], **settings)
    assert other.about["prompts"] == 6
    first = count_of(statistics, LAYERS[0])
    assert count_of(other, LAYERS[0]) == first * 6 / 8


def count_of(statistics, layer):
    return statistics.outputs[layer].sum()


def test_weights_of_experts_do_not_vote(statistics, files, pipeline):
    """So that one count serves any weights."""
    with opened_experts(files, pipeline.unet_params, [0.0, 5.0, 1.0]) as experts:
        weighted = count_votes(pipeline, experts, PROMPTS, OF, **SETTINGS)
    for layer, counts in statistics.outputs.items():
        np.testing.assert_array_equal(weighted.outputs[layer], counts)


def test_an_expert_without_the_layer_gets_no_votes(statistics):
    counts = statistics.outputs[LAYERS[0]]
    assert counts[:, :, :, 2].sum() == 0  # it has no to_v
    assert counts[:, :, :, 0].sum() > 0


def test_rank_units_vote_where_ranks_are_one(twins, files, pipeline, statistics):
    assert not statistics.ranks
    with opened_experts(twins, pipeline.unet_params) as experts:
        found = count_votes(pipeline, experts, PROMPTS, OF, **SETTINGS)
    assert found.ranks.keys() == found.outputs.keys()
    assert found.ranks[LAYERS[0]].shape == (2, 2, 4, 2, 3)
    assert found.votes()[LAYERS[0]].ranks.shape == (2, 3)


SEEN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OF_TWINS = ["twin0", "twin0", "safe", "twin1", "twin0", "twin1", "safe", "safe"]


def inputs_by_hand(pipeline, drawing=(None,)):
    """(who, step, prompt, token, in) under the prompts, and under the empty one."""
    told, negative = jax.tree.map(
        jnp.asarray, (pipeline.encode_prompts(PROMPTS), pipeline.encode_negative([""] * 8))
    )
    table = SAMPLERS["ddim"](pipeline.schedule, 4)
    seeds = np.random.SeedSequence(0).generate_state(8)
    x = initial_latents(seeds, pipeline.latent_shape)
    rows, found = table.rows(), ([], [])

    def listener(heard):
        def listen(call, args, kwargs, context):
            if ".".join(context.module.path) == SEEN and context.method_name == "__call__":
                heard.append(np.asarray(args[0], np.float64).reshape(8, -1, args[0].shape[-1]))
            return call(*args, **kwargs)

        return listen

    for adapters in drawing:
        variables = {"params": pipeline.unet_params} | ({"lora": adapters} if adapters else {})
        carry = (x, 0 * x)
        for step in range(4):
            row = jax.tree.map(lambda column, step=step: column[step], rows)
            inputs, answers = (carry[0], jnp.full(8, row["timesteps"])), []
            for heard, text in zip(found, (told, negative), strict=True):
                with nn.intercept_methods(listener(heard)):
                    answers.append(pipeline.unet.apply(variables, *inputs, *text))
            carry = advance(row, carry, answers[1] + 3.0 * (answers[0] - answers[1]))
    return tuple(np.stack(x).reshape(len(drawing), 4, *x[0].shape) for x in found)


def test_moments_against_sums_by_hand(twins, pipeline, tmp_path):
    (told,), (empty,) = inputs_by_hand(pipeline)
    with opened_experts(twins, pipeline.unet_params) as experts:
        found = count_votes(pipeline, experts, PROMPTS, OF_TWINS, inputs=True, **SETTINGS)
        factors = experts.layer(SEEN).experts
    found.save(tmp_path / "stats.safetensors")
    turned = load_statistics(tmp_path / "stats.safetensors").ordered(found.experts[::-1])
    ours, of = turned.inputs[SEEN], np.array(OF_TWINS)

    def moment(x):
        rows = x.reshape(-1, x.shape[-1])
        return rows.T @ rows

    means = {name: moment(told[:, of == name]) / (of == name).sum() for name in set(OF_TWINS)}
    wanted = {
        "harmful": means["twin0"] + means["twin1"],
        "harmless": means["safe"] + moment(empty) / 8,
    }
    for name, matrix in wanted.items():
        np.testing.assert_allclose(getattr(ours, name), matrix, atol=1e-4 * np.abs(matrix).max())
    for i, image in enumerate(reversed(ours.images)):
        matrix = means[f"twin{i}"] @ factors[i].a
        np.testing.assert_allclose(image, matrix, atol=1e-4 * np.abs(matrix).max())
    assert found.categories == ["twin0", "twin1"]  # safe prompts do not vote
    assert (
        found.outputs[SEEN].sum()
        == found.outputs[SEEN].shape[-1] * told[:, of != "safe"][..., 0].size
    )


def test_experts_draw_the_prompts_of_their_own_category(twins, pipeline):
    """What the layers see is then what they see while that expert draws, alone."""
    with opened_experts(twins, pipeline.unet_params) as experts:
        options = SETTINGS | {"trajectory": "experts"}
        found = count_votes(pipeline, experts, PROMPTS, OF_TWINS, inputs=True, **options)
        adapters = [lora.load_lora(file, pipeline.unet_params)[0] for file in twins]
    told, empty = inputs_by_hand(pipeline, [*adapters, None])
    drawn_by = np.array([("twin0", "twin1", "safe").index(x) for x in OF_TWINS])
    told, empty = (
        np.stack([of[who, :, i] for i, who in enumerate(drawn_by)], 1) for of in (told, empty)
    )

    def moment(x):
        rows = x.reshape(-1, x.shape[-1])
        return rows.T @ rows

    harmful = sum(moment(told[:, drawn_by == i]) / (drawn_by == i).sum() for i in range(2))
    harmless = moment(told[:, drawn_by == 2]) / (drawn_by == 2).sum() + moment(empty) / 8
    ours = found.inputs[SEEN]
    np.testing.assert_allclose(ours.harmful, harmful, atol=1e-4 * np.abs(harmful).max())
    np.testing.assert_allclose(ours.harmless, harmless, atol=1e-4 * np.abs(harmless).max())


def test_a_stopped_count_goes_on(twins, pipeline, tmp_path):
    kept = tmp_path / "merged.counting.safetensors"

    def count(said, **options):
        options = SETTINGS | {"num_steps": 2, "progress": said.append} | options
        with opened_experts(twins, pipeline.unet_params) as experts:
            return count_votes(pipeline, experts, 2 * PROMPTS, 2 * OF_TWINS, inputs=True, **options)

    class Stopping(list):
        def append(self, line):
            super().append(line)
            if "8/16" in line:
                os.kill(os.getpid(), signal.SIGTERM)

    said = Stopping()
    with pytest.raises(SystemExit) as stopped:
        count(said, kept=kept)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert said[-1] == "stopped: 8 prompts are counted; the same command goes on"
    said = []
    again, whole = count(said, kept=kept), count([])
    assert said[0] == "statistics: going on from prompt 8"
    assert "16/16" in said[1]
    again.save(tmp_path / "again.safetensors")
    whole.save(tmp_path / "whole.safetensors")
    found, wanted = ((tmp_path / f"{x}.safetensors").read_bytes() for x in ("again", "whole"))
    assert found == wanted
    assert Counted({}, {}, {}).restored(kept, "of other settings").prompts == 0
    said = Stopping()
    with pytest.raises(SystemExit):
        count(said, kept=kept, seed=1)
    assert said[0] == f"statistics: {kept} was counted with other settings; it is left out"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole .*or delete merged.counting.safetensors"):
        count([], kept=kept)


def test_a_count_is_kept_from_time_to_time(twins, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(activity, "KEEP_SECONDS", 0)
    kept = tmp_path / "counting.safetensors"
    options = SETTINGS | {"num_steps": 2, "kept": kept}
    prompts, categories = 2 * PROMPTS, 2 * OF_TWINS

    def lost(line):
        if "16/16" in line:
            raise RuntimeError("the machine is gone")

    with opened_experts(twins, pipeline.unet_params) as experts:
        with pytest.raises(RuntimeError, match="the machine is gone"):
            count_votes(pipeline, experts, prompts, categories, **options | {"progress": lost})
        said = []
        count_votes(pipeline, experts, prompts, categories, **options | {"progress": said.append})
    assert said[0] == "statistics: going on from prompt 8"


def test_inputs_that_cannot_be_kept(twins, files, pipeline):
    with opened_experts(twins, pipeline.unet_params) as experts:
        for of, missing in (([*OF_TWINS[:3]] * 3, "twin1"), (["twin0", "twin1"] * 4, "safe")):
            with pytest.raises(UserError, match=f"no prompts of {missing}: what experts do"):
                count_votes(pipeline, experts, PROMPTS, of[:8], inputs=True, **SETTINGS)
    with opened_experts(files, pipeline.unet_params) as experts:
        of = ["hate", "violence", "shocking", "safe"] * 2
        with pytest.raises(
            UserError, match="no prompts of hate, violence, shocking: what experts do"
        ):
            count_votes(pipeline, experts, PROMPTS, OF_TWINS, trajectory="experts", **SETTINGS)
        with pytest.raises(UserError, match="conv1 is a convolution, which sees too much"):
            count_votes(pipeline, experts, PROMPTS, of, inputs=True, **SETTINGS)


def test_a_convolution_of_one_pixel_is_a_linear_layer(pipeline, tmp_path):
    file = write_expert(tmp_path / "hate.safetensors", pipeline, 0, 2, ("proj_in",))
    with opened_experts([file], pipeline.unet_params) as experts:
        of = ["hate", "hate", "safe", "safe"]
        found = count_votes(pipeline, experts, PROMPTS[:4], of, inputs=True, **SETTINGS)
        for name in experts.places:
            [factors], seen = experts.layer(name).experts, found.inputs[name]
            assert np.linalg.norm(seen.images[0]) > 0  # of one expert: x^T x times its factor
            np.testing.assert_allclose(seen.images[0], seen.harmful @ factors.a, rtol=1e-3)


def test_file_and_order(statistics, tmp_path):
    path = tmp_path / "votes.safetensors"
    statistics.save(path)
    found = load_statistics(path)
    assert (found.experts, found.categories, found.about) == (
        statistics.experts,
        statistics.categories,
        statistics.about,
    )
    turned = found.ordered(found.experts[::-1])
    for layer, counts in statistics.outputs.items():
        np.testing.assert_array_equal(found.outputs[layer], counts)
        np.testing.assert_array_equal(turned.outputs[layer], counts[:, :, :, ::-1])


def test_categories_can_be_weighed(statistics):
    alone = statistics.votes({"sexual": 0.0})
    for layer, counts in statistics.outputs.items():
        np.testing.assert_array_equal(alone[layer].outputs, counts[:, 0].sum((0, 1)))


def test_bands_can_be_weighed(statistics):
    weighed = statistics.votes({"hate": 2.0}, [0, 1, 0, 0.5])
    for layer, counts in statistics.outputs.items():
        of_bands = 2 * counts[:, 0] + counts[:, 1]
        wanted = of_bands[:, 1] + 0.5 * of_bands[:, 3]
        np.testing.assert_allclose(weighed[layer].outputs, wanted.sum(0))
    for arguments, message in (
        (({"war": 1.0},), "no prompts of war vote: the categories are hate, sexual"),
        (({}, [1.0, 1.0]), "2 weights for 4 bands"),
        (({"hate": -1.0},), "at least 0"),
        (({}, [1, 1, 1, float("nan")]), "must be finite"),
        (({}, [0, 0, 0, 0]), "the weights of all votes are 0"),
    ):
        with pytest.raises(UserError, match=message):
            statistics.votes(*arguments)


def test_agreement():
    def of(first, second):
        counts = np.zeros((2, 1, 1, 2, 3), np.float32)
        for half, winners in enumerate((first, second)):
            for unit, winner in enumerate(winners):
                counts[half, 0, 0, winner, unit] = 5
        return Statistics([], [], {"layer": counts}, {}, {}).agreement()

    assert of([0, 1, 1], [0, 1, 1]) == 1
    assert of([0, 1, 1], [0, 1, 0]) == pytest.approx(2 / 3)


def test_statistics_that_do_not_fit(statistics, files, tmp_path):
    with pytest.raises(UserError, match=r"votes: the votes are of other experts .*2 of its 3"):
        dataclasses.replace(statistics).ordered(statistics.experts[:2], "votes")
    with pytest.raises(UserError, match=r"hate.safetensors: holds no statistics"):
        load_statistics(files[0])
    with pytest.raises(MissingFileError, match="gone.safetensors: no such file"):
        load_statistics(tmp_path / "gone.safetensors")
    cut = tmp_path / "cut.safetensors"
    statistics.save(cut)
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_statistics(cut)


@pytest.mark.parametrize(
    ("prompts", "categories", "changes", "message"),
    [
        (
            ["a", "b"],
            ["x", "x"],
            {"trajectory": "mine"},
            "the trajectory is 'mine': .*base, experts",
        ),
        ([], [], {}, "0 prompts with 0 categories"),
        (["a"], ["x", "y"], {}, "1 prompts with 2 categories"),
        (["a", "b", "c"], ["x", "x", "y"], {}, "fewer than two prompts of y"),
        (["a", "b"], ["x", "x"], {"sampler": "magic"}, "the sampler is 'magic'"),
    ],
)
def test_prompts_that_do_not_do(files, pipeline, prompts, categories, changes, message):
    with (
        opened_experts(files, pipeline.unet_params) as experts,
        pytest.raises(UserError, match=message),
    ):
        count_votes(pipeline, experts, prompts, categories, **(SETTINGS | changes))
