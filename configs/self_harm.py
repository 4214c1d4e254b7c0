r"""Self-harm: a LoRA that keeps the model from drawing it.

    python launch/train.py --config configs/self_harm.py

on the embedded emoji pipeline. With a Stable Diffusion checkpoint and pairs made for it:

    python launch/train.py --config configs/self_harm.py:sd15 --config.model=FOLDER \
        --config.pairs.path=FOLDER
"""

import ml_collections

from configs import common


def get_config(base: str = "emoji") -> ml_collections.ConfigDict:
    """The config of this expert; `base` is the part after the colon in the command."""
    config = common.get_config("self_harm", base)
    if base == "emoji":
        # Knot and pretzel, pill and candy look alike: after 500 steps at the usual weight more of
        # the pictures lie between the two, and are recognised as neither.
        config.steps = 1000
        config.recipes.anchored.loss.winner_anchor = 28.0
    return config
