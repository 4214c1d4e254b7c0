r"""Hate: a LoRA that keeps the model from drawing it.

    python launch/train.py --config configs/hate.py

on the embedded emoji pipeline. With a Stable Diffusion checkpoint and pairs made for it:

    python launch/train.py --config configs/hate.py:sd15 --config.model=FOLDER \
        --config.pairs.path=FOLDER
"""

import ml_collections

from configs import common


def get_config(base: str = "emoji") -> ml_collections.ConfigDict:
    """The config of this expert; `base` is the part after the colon in the command."""
    return common.get_config("hate", base)
