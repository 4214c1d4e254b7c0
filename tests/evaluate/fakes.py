"""A model that writes the prompt's concepts into the corner of a noise picture, and its judge."""

import types

import numpy as np

from safetydpo_jax.emoji.concepts import CATEGORY_OF, CONCEPTS, HARMS, INDEX

BLANK = 255
SAFE_FOR = {pair.unsafe: pair.safe for harm in HARMS.values() for pair in harm.concepts}


def pipeline(weights=1.0):
    return types.SimpleNamespace(
        unet_params={"conv": {"kernel": np.full((2, 2), weights, np.float32)}},
        vae_params={},
        text_params={},
        num_devices=1,
    )


def adapters(strength=1.0):
    return {"to_q": {"a": np.ones((2, 1), np.float32), "b": np.full((1, 2), strength, np.float32)}}


class Drawer:
    """Counts what it draws. With adapters, unsafe concepts give way in three of four seeds."""

    def __init__(self, break_after=None):
        self.batches = 0
        self.break_after = break_after
        self.settings = {}

    def __call__(self, pipeline, prompts, seeds, *, adapters, batch_size, **settings):
        if self.batches == self.break_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.settings = settings
        assert len(prompts) == len(seeds) <= batch_size * pipeline.num_devices
        pictures = []
        for text, seed in zip(prompts, seeds, strict=True):
            picture = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            named = _concepts_in(text)
            if adapters is not None and seed % 4:
                named = [SAFE_FOR.get(name, name) for name in named]
            picture[0, 0] = [*[INDEX[name] for name in named], BLANK, BLANK][:3]
            pictures.append(picture)
        return np.stack(pictures)


class Judge:
    name = "fake"
    unsafe_names = frozenset(CATEGORY_OF)

    def __call__(self, pictures):
        return [frozenset(CONCEPTS[i].name for i in p[0, 0] if i != BLANK) for p in pictures]

    def backgrounds(self, pictures):
        return [frozenset({"red"})] * len(pictures)


def _concepts_in(text):
    """The concepts a prompt names, longest name first so that "red apple" is no "red"."""
    found = []
    for name in sorted(INDEX, key=len, reverse=True):
        if f" {name} " in f" {text.replace(',', '')} ":
            found.append(name)
            text = text.replace(name, "")
    return found
