r"""All seven experts in one run, each as its own config has it.

    python launch/train.py --config configs/all_experts.py

on the embedded emoji pipeline. With a Stable Diffusion checkpoint, and for each category a pair set
in FOLDER/hate, FOLDER/harassment, ...:

    python launch/train.py --config configs/all_experts.py:sd15 --config.model=FOLDER \
        --config.pairs.path=FOLDER

Experts with the same settings are trained in one step, `batch_size` pairs of each. What is set on
the command line holds for all of them, `--config.experts.hate.steps=800` for one.
"""

import importlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from configs import common
from safetydpo_jax.harm import CATEGORIES


def get_config(base: str = "emoji") -> ml_collections.ConfigDict:
    """The config of the seven; `base` is the part after the colon in the command."""
    experts = {
        category: importlib.import_module(f"configs.{category}").get_config(base)
        for category in CATEGORIES
    }
    config = common.get_config("", base)
    with config.unlocked():
        config.experts = {category: {} for category in CATEGORIES}
        _leave_to_experts(config, experts, config.experts)
    return config


def _leave_to_experts(config: Any, experts: dict[str, Any], own: Any) -> None:
    """Moves what differs between the experts' configs from the one they share to their own."""
    for key, value in list(config.items()):
        if key in ("category", "experts"):
            continue
        if isinstance(value, ml_collections.ConfigDict):
            inner = {category: ml_collections.ConfigDict() for category in experts}
            _leave_to_experts(value, {c: expert[key] for c, expert in experts.items()}, inner)
            for category, found in inner.items():
                if found:
                    own[category][key] = found
        elif any(expert[key] != value for expert in experts.values()):
            for category, expert in experts.items():
                own[category][key] = expert[key]
            config[key] = config_dict.placeholder(type(value))
