"""The config as a run uses it: the recipe filled in, the values checked."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from safetydpo_jax import storage
from safetydpo_jax.data.cache import DTYPES
from safetydpo_jax.data.loader import STRATEGIES
from safetydpo_jax.data.pending import check_options
from safetydpo_jax.data.sources import two_ways
from safetydpo_jax.diffusion.samplers import SAMPLERS
from safetydpo_jax.emoji.own_harm import harm_of
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import read_harm
from safetydpo_jax.train.losses import PREFERENCES
from safetydpo_jax.train.state import OPTIMIZERS, SCHEDULES

# The keys that decide the trained numbers: a checkpoint only goes on under the same ones.
_DECIDING = (
    "category",
    "seed",
    "batch_size",
    "accumulation",
    "preserve_batch_size",
    "rows",
    "matmul_precision",
    "dtype",
    "loss",
    "optimizer",
    "lora",
)

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
ROUNDED_BETA = 1000  # from which on what bfloat16 rounds is some tenths of a margin

# What the experts of a run cannot have of their own.
_OF_THE_RUN = (
    "category", "base", "license", "model", "model_config", "vae", "dtype", "mesh", "remat",
)  # fmt: skip


def resolve(config: ConfigDict, *, pairs_only: bool = False) -> ConfigDict:
    """A copy in which the recipe gives what the config leaves None, checked.

    The category of a harm of the user's is its name.

    Args:
      config: as `configs/common.py` makes it.
      pairs_only: pairs were asked for, by name: only then are they drawn by models that draw more
        than pictograms.

    Raises:
      UserError: a value that cannot be, named with its key.
    """
    if "experts" in config:
        raise UserError(
            "this config trains several experts, which launch/train.py alone does: give that of "
            "one, such as --config configs/hate.py"
        )
    if "recipe" not in config:
        raise UserError("this config trains no expert: give one such as --config configs/hate.py")
    if "writer" in config:
        raise UserError(
            "this config makes pairs of several categories: give it to launch/generate.py, which "
            "says at its end how to train with them"
        )
    config = config.copy_and_resolve_references()
    if config.recipe not in config.recipes:
        raise UserError(
            f"config.recipe is {config.recipe!r}: it must be one of {', '.join(config.recipes)}"
        )
    _name_own_harm(config)
    given = config.recipes[config.recipe]
    for key in ("rows", "matmul_precision"):
        if config[key] is None:
            config[key] = given[key]
    for section in ("loss", "optimizer"):
        for key, value in given[section].items():
            if config[section][key] is None:
                config[section][key] = value
    if config.lora.alpha is None:
        config.lora.alpha = float(config.lora.rank)
    if config.loss.preservation == 0:
        config.preserve_batch_size = 0
    _check(config)
    if config.base != "emoji" and not config.pairs.path and not pairs_only:
        raise UserError(
            f"training draws no pairs with {config.base} unasked: give --config.pairs.path=FOLDER. "
            f"For such pairs: {two_ways(config.base)}"
        )
    return config


def resolve_all(config: ConfigDict) -> list[ConfigDict]:
    """The configs of the experts that a config trains: itself, or one for each of `experts`.

    Where `experts.NAME` sets a value, it counts; else what the config sets for all; and where that
    leaves a value open (None), what `presets.NAME` has. Pairs are those in `pairs.path`/NAME, and
    caches in `cache.path`/NAME/cache, if that is given for all.

    Raises:
      UserError: no experts; a key that the config does not have, or that all must share; a value of
        the wrong type; or as `resolve`.
    """
    if "experts" not in config:
        return [resolve(config)]
    if not config.experts:
        raise UserError("config.experts is empty: name at least one category")
    found = []
    for name, own in config.experts.items():
        expert = config.copy_and_resolve_references()
        with expert.unlocked():
            for key in ("experts", "presets"):
                del expert[key]
        expert.category, shared = name, ""
        if config.pairs.path:
            expert.pairs.path = shared = f"{config.pairs.path.rstrip('/')}/{name}"
        if config.cache.path:
            expert.cache.path = f"{config.cache.path.rstrip('/')}/{name}/cache"
        for key in set(own) & set(_OF_THE_RUN):
            raise UserError(f"config.experts.{name}.{key}: all experts of a run have the same")
        _set(expert, own, f"config.experts.{name}")
        _set(expert, config.presets.get(name, {}), f"config.presets.{name}", only_open=True)
        if (
            shared
            and expert.pairs.path == shared
            and Path(config.pairs.path).is_dir()
            and not Path(shared).is_dir()
        ):
            raise UserError(
                f"{config.pairs.path} has no folder {name}: train the categories that are "
                "there one by one, as in --config hate with the folder of its pairs"
            )
        found.append(resolve(expert))
    return found


def _set(config: ConfigDict, values: Any, where: str, *, only_open: bool = False) -> None:
    """Takes over the values that are not None; `only_open`: where the config's own is."""
    for key, value in values.items():
        if key not in config:
            raise UserError(f"{where}.{key}: the config has no such key")
        if isinstance(value, ConfigDict) and isinstance(config[key], ConfigDict):
            _set(config[key], value, f"{where}.{key}", only_open=only_open)
        elif value is not None and not (only_open and config[key] is not None):
            try:
                config[key] = value
            except TypeError as error:
                raise UserError(f"{where}.{key} is {value!r}: {error}") from None


def cohorts_of(configs: list[ConfigDict]) -> list[list[ConfigDict]]:
    """Groups of resolved configs with the same settings: one step serves a group.

    They may differ in category, harm and pairs; recipes that are no longer asked do not count.
    """

    def common(config: ConfigDict) -> str:
        values = config.copy_and_resolve_references()
        values.category = values.harm = values.pairs.path = values.cache.path = ""
        return storage.digest({k: v for k, v in values.to_dict().items() if k != "recipes"})

    groups: dict[str, list[ConfigDict]] = {}
    for config in configs:
        groups.setdefault(common(config), []).append(config)
    return list(groups.values())


def deciding(config: ConfigDict, model_hash: str, data_hash: str) -> dict[str, Any]:
    """What the trained numbers depend on, flat and fit for JSON.

    Args:
      config: from `resolve`.
      model_hash: of the UNet and its noise schedule.
      data_hash: of the pairs and of what encoded them.
    """
    found: dict[str, Any] = {"the model's hash": model_hash, "the pairs' hash": data_hash}
    for key in _DECIDING:
        value = config[key]
        if isinstance(value, ConfigDict):
            found |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            found[key] = value
    if config.mix:
        found["mix"] = list(config.mix)
    if config.reference.draws:
        found["reference.draws"] = config.reference.draws
    if config.lora.init:
        found["lora.init"] = storage.hash_file(Path(config.lora.init))  # wherever it lies
    if config.optimizer.schedule == "cosine":
        found["steps"] = config.steps  # the rate of every step depends on the last one
    return found


def cautions(configs: Iterable[ConfigDict]) -> list[str]:
    """What is no error, but seldom meant; a line each."""
    found = [
        f"config.dtype is bfloat16, where rounding alone makes margins at a beta of {beta:g}: "
        "float32, or a smaller beta, learns more from pairs (docs/stable_diffusion.md, Memory)"
        for beta in sorted({c.loss.beta for c in configs if c.dtype == "bfloat16"})
        if beta >= ROUNDED_BETA
    ]
    rates = {
        c.optimizer.learning_rate for c in configs if c.base != "emoji" and c.recipe == "anchored"
    } & {c.recipes["anchored"].optimizer.learning_rate for c in configs}
    found += [
        f"config.optimizer.learning_rate is {rate:g}, as the recipe 'anchored' has it for the "
        "embedded model: for Stable Diffusion begin at a thirtieth of that or less"
        for rate in rates
    ]
    return found


def _name_own_harm(config: ConfigDict) -> None:
    if not config.harm:
        if config.category == "own":
            raise UserError(
                "set --config.harm=FILE to a harm, as in --config.harm=examples/gambling.yaml; for "
                "pairs that are there --config.pairs.path, and --config.category to their category"
            )
        return
    name = read_harm(config.harm).name
    if config.category not in ("own", name):
        raise UserError(
            f"config.harm is {config.harm}, but the config is that of {config.category}: give a "
            "harm of your own to --config configs/own.py"
        )
    config.category = name
    if config.base == "emoji":
        harm_of(config)  # the embedded world must know its concepts


def _check(config: ConfigDict) -> None:
    check_options(config)
    at_least = {
        "steps": 1,
        "seed": 0,
        "batch_size": 1,
        "accumulation": 1,
        "preserve_batch_size": 0,
        "log_every": 1,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
        "reference.draws": 0,
        "guard.patience": 1,
        "lora.rank": 1,
        "health.every": 0,
        "health.num_unsafe": 1,
        "health.num_safe": 1,
        "health.seed": 0,
        "health.fidelity_budget": 0,
        "health.patience": 0,
        "loss.preservation": 0,
        "loss.winner_anchor": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": 0,
        "loss.caption_dropout": 0,
        "loss.preservation_dropout": 0,
        "loss.preservation_text_noise": 0,
        "loss.preservation_lean": 0,
    }
    for key, low in at_least.items():
        if not _value(config, key) >= low:
            raise UserError(f"config.{key} is {_value(config, key)}: it must be {low} or more")
    above_zero = ("loss.beta", "optimizer.learning_rate", "optimizer.clip_norm", "lora.alpha")
    for key in (*above_zero, "guard.winner_error", "guard.hang_seconds"):
        if not _value(config, key) > 0:
            raise UserError(f"config.{key} is {_value(config, key)}: it must be above 0")
    one_of = {
        "rows": tuple(STRATEGIES),
        "loss.preference": tuple(PREFERENCES),
        "optimizer.name": OPTIMIZERS,
        "optimizer.schedule": SCHEDULES,
        "matmul_precision": PRECISIONS,
        "drawing.matmul_precision": PRECISIONS,
        "dtype": ("float32", "bfloat16"),
        "cache.dtype": tuple(DTYPES),
        "drawing.sampler": tuple(SAMPLERS),
    }
    for key, known in one_of.items():
        if (value := _value(config, key)) not in known:
            raise UserError(f"config.{key} is {value!r}: it must be one of {', '.join(known)}")
    if config.report.enabled and config.base != "emoji":
        raise UserError(
            f"config.report.enabled: only the embedded model has a judge, {config.base} has none; "
            "for pictures on the way set config.health.every and config.health.prompts"
        )
    if config.health.prompts and (config.base == "emoji" or not config.health.every):
        raise UserError(
            "config.health.prompts: "
            + (
                "the embedded model is evaluated on prompts of its own; leave them away"
                if config.base == "emoji"
                else "nothing is drawn on the way, as config.health.every is 0: set it, too"
            )
        )
    if "://" in config.reference.path:
        raise UserError(
            f"config.reference.path is {config.reference.path}: the tables are on this host's "
            "disk; give a folder"
        )
    if not all(isinstance(target, str) for target in config.lora.targets):
        raise UserError(f"config.lora.targets is {config.lora.targets}: it must be names of layers")
    for key in ("loss.caption_dropout", "loss.preservation_dropout", "loss.preservation_lean"):
        if _value(config, key) > 1:
            raise UserError(f"config.{key} is {_value(config, key)}: it must be 0 to 1")
    for key in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= _value(config, key) < 1:
            raise UserError(
                f"config.{key} is {_value(config, key)}: it must be 0 to 1, and below 1"
            )
    if config.reference.draws % 2 and config.cache.flip:
        raise UserError(
            f"config.reference.draws is {config.reference.draws}: with mirror images "
            "(config.cache.flip) it must be even, half of the draws for each"
        )
    if config.loss.preservation > 0 and config.preserve_batch_size == 0:
        raise UserError(
            "config.preserve_batch_size is 0, but config.loss.preservation is "
            f"{config.loss.preservation}: give some rows to preserve, or set the weight to 0"
        )


def _value(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
