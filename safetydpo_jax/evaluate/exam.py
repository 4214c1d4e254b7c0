"""A small evaluation that can be made again and again: the same prompts, from the same noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from safetydpo_jax import storage
from safetydpo_jax.diffusion.samplers import draw_pictures
from safetydpo_jax.emoji.own_harm import harm_of
from safetydpo_jax.errors import UserError
from safetydpo_jax.evaluate import metrics
from safetydpo_jax.evaluate.detections import Detections, EmojiJudge, detect
from safetydpo_jax.evaluate.report import SECTIONS, picture_seeds, report_prompts
from safetydpo_jax.evaluate.summary import hidden

COLUMNS = 8  # pictures of each set that are shown
Rates = dict[str, float]


@dataclass(frozen=True)
class Shown:
    """The first pictures of a set of prompts, and what each counts as (see `pictures.Row`)."""

    title: str
    labels: list[str]
    pictures: UInt8[np.ndarray, "n H W 3"]
    marks: list[str]
    hide: Bool[np.ndarray, " n"]


class EmojiExam:
    """IP and fidelity on the embedded world's prompts for tuning, judged by its detector.

    As it chooses what is exported, the report's prompts are others, unless its own split is "tune".

    Args:
      config: from `settings.resolve`; `health`, `drawing`, the category or the harm.
      pipeline: the base model.
      folder: where pictures are kept; not blurred.
    """

    def __init__(self, config: Any, pipeline: Any, folder: Path):
        harm, health = harm_of(config), config.health
        self._pipeline, self._drawing, self._folder = pipeline, config.drawing.to_dict(), folder
        self._judge = EmojiJudge(harm.unsafe_names)
        numbers = health.num_unsafe, health.num_safe, health.seed
        prompts = report_prompts(harm, *numbers, split="tune", section="health")
        self._prompts = {name: prompts[name] for name in SECTIONS}
        self._seeds = picture_seeds(self._prompts, health.seed)
        self.settings = {
            **{f"health.{k}": health[k] for k in ("num_unsafe", "num_safe", "seed")},
            "the prompts' hash": storage.digest([[r.text for r in v] for v in prompts.values()]),
            **{f"drawing.{k}": v for k, v in self._drawing.items()},
            "judge": self._judge.name,
        }

    def __call__(self, adapters: Mapping | None) -> tuple[Rates, list[Shown]]:
        """Draws with adapters that are ready to apply, or with the base model alone.

        Returns:
          Rates, with the standard errors (one picture at least) of those that decide, and pictures.
        """
        found = {name: self._draw(name, adapters) for name in SECTIONS}
        base = found if adapters is None else {name: self._draw(name, None) for name in SECTIONS}
        unsafe = metrics.judge_unsafe(
            found["unsafe"].names,
            found["unsafe"].backgrounds,
            self._prompts["unsafe"],
            self._judge.unsafe_names,
        )
        before, after = (
            metrics.judge_safe(f["safe"].names, self._prompts["safe"], self._judge.unsafe_names)
            for f in (base, found)
        )
        lost = before.faithful.astype(float) - after.faithful
        ip, count = float(unsafe.shows("unsafe").mean()), len(unsafe.outcome)
        rates = {
            "ip": ip,
            "ip_error": max(math.sqrt(ip * (1 - ip) / count), 1 / count),
            "counterpart": float(unsafe.shows("counterpart").mean()),
            "unsafe_junk": float(unsafe.shows("junk").mean()),
            "fidelity": float(after.faithful.mean()),
            "fidelity_loss": float(lost.mean()),
            "fidelity_loss_error": max(float(lost.std()) / math.sqrt(len(lost)), 1 / len(lost)),
            "junk": float(after.junk.mean()),
        }
        marks = {"unsafe": unsafe.marks(), "safe": after.marks()}
        return rates, [self._shown(n, found[n], marks[n], adapters is None) for n in SECTIONS]

    def _draw(self, name: str, adapters: Mapping | None) -> Detections:
        records = self._prompts[name]
        return detect(
            self._pipeline,
            [record.text for record in records],
            self._seeds[name],
            self._judge,
            self._folder,
            adapters=adapters,
            keep=range(min(COLUMNS, len(records))),
            progress=lambda line: None,
            **self._drawing,
        )

    def _shown(self, name: str, found: Detections, marks: list[str], is_base: bool) -> Shown:
        count = len(found.pictures)
        return Shown(
            SECTIONS[name],
            [record.id for record in self._prompts[name][:count]],
            np.stack([found.pictures[i] for i in range(count)]),
            marks[:count],
            hidden(name, marks[:count], is_base=is_base),
        )


class SampleExam:
    """The user's own prompts, `config.health.prompts`, drawn and not judged: there are no rates.

    As nobody says what they show, all of them are hidden.

    Raises:
      UserError: there are no such prompts.
    """

    def __init__(self, config: Any, pipeline: Any, folder: Path):
        del folder  # nothing is kept
        self._texts = list(config.health.prompts)
        if not self._texts:
            raise UserError(
                f"config.health.every is {config.health.every}, but there is no judge for "
                f"{config.base}: give prompts to draw as --config.health.prompts=\"('...',)\", or "
                "set config.health.every=0"
            )
        self._pipeline, self._drawing = pipeline, config.drawing.to_dict()
        self._seeds = np.random.SeedSequence(config.health.seed).generate_state(len(self._texts))
        self.settings = {
            "health.seed": config.health.seed,
            "the prompts' hash": storage.digest(self._texts),
            **{f"drawing.{k}": v for k, v in self._drawing.items()},
        }

    def __call__(self, adapters: Mapping | None) -> tuple[Rates, list[Shown]]:
        """Draws with adapters that are ready to apply, or with the base model alone."""
        pictures = draw_pictures(
            self._pipeline, self._texts, self._seeds, adapters=adapters, **self._drawing
        )
        count = len(self._texts)
        labels = [f"prompt {i}" for i in range(count)]
        shown = Shown(
            "Your prompts", labels, pictures, ["not judged"] * count, np.ones(count, bool)
        )
        return {}, [shown]
