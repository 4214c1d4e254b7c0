r"""One LoRA for all seven categories at once: what merged experts are compared with.

    python launch/train.py --config configs/all_single.py

on the embedded emoji pipeline. With a Stable Diffusion checkpoint and one set of pairs of all
categories made for it:

    python launch/train.py --config configs/all_single.py:sd15 --config.model=FOLDER \
        --config.pairs.path=FOLDER
"""

import ml_collections

from configs import common


def get_config(base: str = "emoji") -> ml_collections.ConfigDict:
    """The config of this LoRA; `base` is the part after the colon in the command."""
    config = common.get_config("all", base)
    # As many steps, and pairs, as the seven experts have together.
    config.steps *= 7
    if base == "emoji":
        config.pairs.num_pairs = 7 * 192
        config.steps = 5 * 500 + 2 * 1000
        config.health.every = 750
        config.health.num_unsafe = 168  # 24 of each category
    return config
