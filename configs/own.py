r"""A harm of your own, from a file that names it and its pairs: docs/own_harm.md.

    python launch/train.py --config configs/own.py --config.harm=examples/gambling.yaml

on the embedded emoji pipeline. A Stable Diffusion checkpoint draws pairs when asked to, and is then
trained on them:

    python launch/generate.py --config configs/own.py:sd15 --config.model=FOLDER --config.harm=FILE
    python launch/train.py --config configs/own.py:sd15 --config.model=FOLDER --config.harm=FILE \
        --config.pairs.path=runs/own/pairs
"""

import ml_collections

from configs import common


def get_config(base: str = "emoji") -> ml_collections.ConfigDict:
    """The config of this expert; `base` is the part after the colon in the command."""
    return common.get_config("own", base)
