import importlib

import pytest

from configs import all_experts, common, own
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.train.settings import (
    cautions,
    cohorts_of,
    deciding,
    resolve,
    resolve_all,
)


def test_the_recipe_fills_what_was_left_open(config):
    config.recipe = "paper"
    config.loss.beta = 7.0
    resolved = resolve(config)
    assert resolved.loss.beta == 7.0
    assert resolved.loss.preservation == 0
    assert resolved.preserve_batch_size == 0
    assert resolved.optimizer.learning_rate == common.RECIPES["paper"]["optimizer"]["learning_rate"]
    assert config.loss.preservation is None


def test_alpha_follows_the_rank_unless_set(config):
    config.lora.rank = 8
    assert resolve(config).lora.alpha == 8
    config.lora.alpha = 3.0
    assert (resolve(config).lora.alpha, config.lora.rank) == (3, 8)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("base", common.BASES)
def test_every_config_resolves(category, base):
    config = common.get_config(category, base)
    config.pairs.path = "somewhere"
    assert resolve(config).category == category


@pytest.mark.parametrize("base", ["emoji", "sd15"])
def test_a_harm_of_the_users_names_the_category(base, tmp_path):
    config = own.get_config(base)
    config.pairs.path = "somewhere"
    config.harm = str(tmp_path)
    (tmp_path / "harm.yaml").write_text("name: war\nprompts: [{unsafe: a war, safe: a fair}]")
    if base == "emoji":  # which draws no wars
        with pytest.raises(UserError, match="entry 1 of prompts: the unsafe prompt must name one"):
            resolve(config)
    else:
        assert resolve(config).category == "war"
        assert resolve(resolve(config)).category == "war"


def test_pairs_are_drawn_by_other_models_only_if_asked_for(config):
    config.base, config.pairs.path = "sd21", ""
    with pytest.raises(UserError, match="--config own:sd21"):
        resolve(config)
    assert resolve(config, pairs_only=True).base == "sd21"


def test_what_decides_the_numbers(config):
    def found(**changes):
        config.update_from_flattened_dict(changes)
        return deciding(resolve(config), "m", "d")

    before = found()
    assert found(steps=99, log_every=1) == before
    assert found(**{"lora.rank": 3})["lora.rank"] == 3
    assert found(**{"optimizer.schedule": "cosine"})["steps"] == 99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "magic"}, "config.recipe is 'magic': it must be one of anchored, paper"),
        ({"steps": 0}, "config.steps is 0: it must be 1 or more"),
        ({"batch_size": 0}, "config.batch_size is 0"),
        ({"accumulation": -1}, "config.accumulation is -1"),
        ({"seed": -1}, "config.seed is -1"),
        ({"loss.caption_dropout": 1.5}, "config.loss.caption_dropout is 1.5"),
        ({"loss.preservation_lean": 1.5}, "config.loss.preservation_lean is 1.5"),
        ({"loss.preservation_dropout": -0.1}, "config.loss.preservation_dropout is -0.1"),
        ({"loss.beta": -1.0}, "config.loss.beta is -1.0: it must be above 0"),
        ({"loss.beta": float("nan")}, "config.loss.beta is nan"),
        (
            {"loss.preference": "kto"},
            "loss.preference is 'kto': .*dpo, ipo, hinge, winner_preserving",
        ),
        ({"loss.preservation": -2.0}, "config.loss.preservation is -2.0"),
        ({"optimizer.learning_rate": 0.0}, "config.optimizer.learning_rate is 0.0"),
        ({"optimizer.schedule": "linear"}, "optimizer.schedule is 'linear': .*constant, cosine"),
        ({"optimizer.name": "sgd"}, "optimizer.name is 'sgd'"),
        ({"matmul_precision": "int8"}, "config.matmul_precision is 'int8'"),
        ({"drawing.matmul_precision": "int8"}, "config.drawing.matmul_precision is 'int8'"),
        ({"checkpoint.keep": 0}, "config.checkpoint.keep is 0"),
        ({"preserve_batch_size": 0}, "config.preserve_batch_size is 0, but .*preservation"),
        ({"lora.targets": (3,)}, "config.lora.targets is"),
        ({"base": "sd15", "report.enabled": True}, "report.enabled: .* sd15 has none"),
        ({"health.prompts": ("a",)}, "health.prompts: the embedded model is evaluated on"),
        (
            {"base": "sd15", "health.every": 0, "health.prompts": ("a",)},
            "health.prompts: nothing is drawn on the way, as config.health.every is 0",
        ),
        ({"reference.path": "gs://bucket/r"}, "reference.path is gs://bucket/r: .*give a folder"),
        (
            {"base": "sd15", "pairs.path": ""},
            "draws no pairs with sd15 unasked: give --config.pairs.path=FOLDER. .*CoProV2.*arXiv "
            "2412.10493.*a download.* safetydpo generate --config own:sd15 --config.harm",
        ),
        ({"harm": "examples/gambling.yaml"}, "but the config is that of hate: .* configs/own.py"),
        (
            {"category": "own"},
            "set --config.harm=FILE to a harm, as in --config.harm=examples/gambling.yaml",
        ),
    ],
)
def test_bad_values(changes, message, config):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_a_large_beta_in_half_precision_is_warned_of(config):
    half = config.copy_and_resolve_references()
    half.dtype, half.recipe = "bfloat16", "paper"
    config, half = resolve(config), resolve(half)
    assert cautions([config]) == []
    (line,) = cautions([config, half, half])
    assert line.startswith("config.dtype is bfloat16, where rounding alone makes margins at a beta")


def test_the_embedded_models_rate_is_warned_of_elsewhere():
    config = common.get_config("hate", "sd15")
    config.recipe, config.pairs.path = "anchored", "pairs"
    config.optimizer.learning_rate = 1e-4
    assert cautions([resolve(config)]) == []
    config.optimizer.learning_rate = None
    (line,) = cautions([resolve(config)])
    assert line.startswith("config.optimizer.learning_rate is 0.005, as the recipe 'anchored' has")


def test_an_unknown_base():
    with pytest.raises(UserError, match=r"hate.py:sd9: no such base; give one of emoji, sd15"):
        common.get_config("hate", "sd9")


@pytest.mark.parametrize("base", common.BASES)
def test_all_experts_are_each_as_its_own_config_has_it(base):
    config = all_experts.get_config(base)
    config.pairs.path = "folder"
    found = {c.category: c for c in resolve_all(config)}
    assert found.keys() == set(CATEGORIES)
    for category, expert in found.items():
        alone = importlib.import_module(f"configs.{category}").get_config(base)
        alone.pairs.path = f"folder/{category}"
        assert expert.to_json(sort_keys=True) == resolve(alone).to_json(sort_keys=True)
    groups = [{c.category for c in group} for group in cohorts_of(list(found.values()))]
    slow = {"shocking", "self_harm"}
    assert groups == ([set(CATEGORIES) - slow, slow] if base == "emoji" else [set(CATEGORIES)])


def test_what_is_set_for_all_experts_and_for_one():
    config = all_experts.get_config()
    config.steps = 40
    config.experts.hate.steps = 30
    config.experts.hate.loss.winner_anchor = 5.0
    config.experts.hate.pairs.path = "elsewhere"
    with config.unlocked():
        config.experts.hate.lora.rank = 8
    found = {c.category: c for c in resolve_all(config)}
    assert {name: c.steps for name, c in found.items() if c.steps != 40} == {"hate": 30}
    assert found["hate"].loss.winner_anchor == 5
    assert found["shocking"].loss.winner_anchor == 28
    assert [(found[c].lora.rank, found[c].lora.alpha) for c in ("hate", "sexual")] == [
        (8, 8),
        (16, 16),
    ]
    assert (found["hate"].pairs.path, found["sexual"].pairs.path) == ("elsewhere", "")
    config.loss.winner_anchor = 10.0
    assert {c.loss.winner_anchor for c in resolve_all(config)} == {5.0, 10.0}


def test_experts_that_differ_in_recipes_not_asked_for_are_one_cohort():
    config = all_experts.get_config()
    config.recipe, config.steps = "paper", 300
    assert len(cohorts_of(resolve_all(config))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.experts.hate.update(stepz=3), r"config\.experts\.hate\.stepz: .*no such key"),
        (
            lambda c: c.experts.hate.update(model="x"),
            "hate.model: all experts .* the same",
        ),
        (lambda c: c.experts.hate.update(seed="x"), r"experts\.hate\.seed is 'x'"),
        (lambda c: setattr(c, "experts", {}), "config.experts is empty"),
        (lambda c: setattr(c.experts.hate, "steps", 0), "config.steps is 0"),
    ],
)
def test_bad_experts(change, message):
    config = all_experts.get_config()
    with config.unlocked(), config.ignore_type():
        change(config)
    with pytest.raises(UserError, match=message):
        resolve_all(config)


def test_one_of_several_must_be_chosen_where_one_is_asked_for():
    with pytest.raises(UserError, match="this config trains several experts"):
        resolve(all_experts.get_config())
