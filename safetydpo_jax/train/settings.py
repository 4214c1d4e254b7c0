"""The config as a run uses it: the recipe filled in, the values checked."""

from typing import Any

from ml_collections import ConfigDict

from safetydpo_jax.errors import UserError
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
    "loss",
    "optimizer",
    "lora",
)


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy in which the recipe gives what `rows`, `loss` and `optimizer` leave None, checked.

    Raises:
      UserError: a value that cannot be, named with its key.
    """
    config = config.copy_and_resolve_references()
    if config.recipe not in config.recipes:
        raise UserError(
            f"config.recipe is {config.recipe!r}: it must be one of {', '.join(config.recipes)}"
        )
    given = config.recipes[config.recipe]
    if config.rows is None:
        config.rows = given.rows
    for section in ("loss", "optimizer"):
        for key, value in given[section].items():
            if config[section][key] is None:
                config[section][key] = value
    if config.loss.preservation == 0:
        config.preserve_batch_size = 0
    _check(config)
    return config


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
    if config.optimizer.schedule == "cosine":
        found["steps"] = config.steps  # the rate of every step depends on the last one
    return found


def _check(config: ConfigDict) -> None:
    at_least = {
        "steps": 1,
        "seed": 0,
        "batch_size": 1,
        "accumulation": 1,
        "preserve_batch_size": 0,
        "log_every": 1,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
        "guard.patience": 1,
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
    for key in (*above_zero, "guard.winner_error"):
        if not _value(config, key) > 0:
            raise UserError(f"config.{key} is {_value(config, key)}: it must be above 0")
    one_of = {
        "loss.preference": tuple(PREFERENCES),
        "optimizer.name": OPTIMIZERS,
        "optimizer.schedule": SCHEDULES,
        "matmul_precision": ("float32", "tensorfloat32", "bfloat16"),
    }
    for key, known in one_of.items():
        if (value := _value(config, key)) not in known:
            raise UserError(f"config.{key} is {value!r}: it must be one of {', '.join(known)}")
    if not all(isinstance(target, str) for target in config.lora.targets):
        raise UserError(f"config.lora.targets is {config.lora.targets}: it must be names of layers")
    for key in ("loss.caption_dropout", "loss.preservation_dropout", "loss.preservation_lean"):
        if _value(config, key) > 1:
            raise UserError(f"config.{key} is {_value(config, key)}: it must be 0 to 1")
    if config.loss.preservation > 0 and config.preserve_batch_size == 0:
        raise UserError(
            "config.preserve_batch_size is 0, but config.loss.preservation is "
            f"{config.loss.preservation}: give some rows to preserve, or set the weight to 0"
        )
    if config.base != "emoji" and not config.pairs.path:
        raise UserError(
            f"there are no pairs for {config.base}: none are shipped and none can be drawn yet; "
            "give a folder of pairs as --config.pairs.path=FOLDER, or use the emoji base"
        )


def _value(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
