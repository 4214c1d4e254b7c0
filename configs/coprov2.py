r"""Pair sets of all categories, made as CoProV2 was: from concepts to pictures, and their cache.

    python launch/generate.py --config configs/coprov2.py --workdir runs/coprov2

on the embedded emoji pipeline, which writes its own prompts about the pictograms of
examples/concepts.csv: 3,000 pairs, an hour or more on two cores. With a Stable Diffusion
checkpoint, and a language model that writes about a list of concepts of yours:

    python launch/generate.py --config configs/coprov2.py:sd15 --config.model=FOLDER \
        --config.writer.concepts=concepts.csv --config.writer.endpoint=http://localhost:8000/v1 \
        --config.writer.model=NAME --workdir runs/coprov2_sd15

docs/pairs/factory.md says more.
"""

import ml_collections

from configs import common


def get_config(base: str = "emoji") -> ml_collections.ConfigDict:
    """The config of the factory; `base` is the part after the colon in the command."""
    config = common.get_config("", base)
    with config.unlocked():
        config.writer = {
            "concepts": "",  # a table with the columns category,concept, or a harm's YAML file
            # Of an endpoint that speaks OpenAI's chat protocol; "" is none.
            "endpoint": "",
            # Its name there; without an endpoint, a model of transformers, a folder or hub id; or
            # "grammar": the embedded world's own prompts.
            "model": "",
            # The texts of the requests for pairs, and for verdicts on them; "" are those shipped.
            "template": "",
            "judge_template": "",
            "judge": True,  # whether pairs are asked about again, and left out if found wrong
            "per_concept": 20,  # pairs that are asked for
            "per_request": 10,
            "temperature": 1.0,
            "attempts": 3,  # at a request whose answers cannot be used
            "concurrency": 8,  # requests at a time
            "requests_per_minute": 0.0,  # at most; 0 is no limit
            "timeout": 120.0,  # seconds of one request
        }
    # Over all categories, of each as many.
    config.pairs.num_pairs = 3000 if base == "emoji" else 15690
    if base == "emoji":
        config.writer.concepts = "examples/concepts.csv"
        config.writer.model = "grammar"
    return config
