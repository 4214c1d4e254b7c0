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
        # None: as it is set for all.
        config.experts = {
            category: {
                "steps": config_dict.placeholder(int),
                "seed": config_dict.placeholder(int),
                "loss": {
                    "beta": config_dict.placeholder(float),
                    "preservation": config_dict.placeholder(float),
                    "winner_anchor": config_dict.placeholder(float),
                },
                "optimizer": {"learning_rate": config_dict.placeholder(float)},
                "lora": {"init": config_dict.placeholder(str)},
                "pairs": {"path": config_dict.placeholder(str)},
            }
            for category in CATEGORIES
        }
        # What it is where nothing is set for all: the categories' own configs differ there.
        config.presets = {category: {} for category in CATEGORIES}
        _leave_open(config, experts, config.presets)
    return config


def _leave_open(config: Any, experts: dict[str, Any], presets: Any) -> None:
    """Moves what differs between the experts' configs from the one they share to the presets."""
    for key, value in list(config.items()):
        if key in ("category", "experts", "presets"):
            continue
        if isinstance(value, ml_collections.ConfigDict):
            inner = {category: ml_collections.ConfigDict() for category in experts}
            _leave_open(value, {c: expert[key] for c, expert in experts.items()}, inner)
            for category, found in inner.items():
                if found:
                    presets[category][key] = found
        elif any(expert[key] != value for expert in experts.values()):
            for category, expert in experts.items():
                presets[category][key] = expert[key]
            config[key] = config_dict.placeholder(type(value))
