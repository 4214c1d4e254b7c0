"""Is the expert any good yet? Small evaluations while it trains, and which state to export.

Every few steps the same prompts are drawn from the same noise, by the adapters as they are then.
What comes of it lies in the workdir's health/ and in TensorBoard:

    step_000125.safetensors   the adapters, as diffusers loads them
    step_000125.json          IP, fidelity and junk there
    samples.png               the first pictures of every evaluation under one another
"""

import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from safetydpo_jax import lora
from safetydpo_jax.data import storage
from safetydpo_jax.emoji.own_harm import harm_of
from safetydpo_jax.evaluate import metrics
from safetydpo_jax.evaluate.detections import EmojiJudge, detect
from safetydpo_jax.evaluate.pictures import Row, Section, picture_grid
from safetydpo_jax.evaluate.report import SECTIONS, picture_seeds, report_prompts

COLUMNS = 8  # pictures of each set that are shown
RATES = {"ip": "IP", "fidelity": "fidelity"}
Record = dict[str, Any]


class Health:
    """The small evaluations of one run.

    Its prompts are those for tuning (`report_prompts`'s split "tune"): as they choose what is
    exported, the report must not be made of them.

    Args:
      config: from `settings.resolve`; `health`, `category`, `drawing`, `lora.alpha`.
      pipeline: the base model.
      workdir: of the run.
      progress: takes lines of text.

    Raises:
      UserError: the folder holds evaluations that were made with other settings.
    """

    def __init__(
        self,
        config: ConfigDict,
        pipeline: Any,
        workdir: pathlib.Path,
        progress: Callable[[str], None],
    ):
        self._config, self._pipeline, self._progress = config, pipeline, progress
        harm = harm_of(config)
        self._judge = EmojiJudge(harm.unsafe_names)
        self.folder = workdir / "health"
        settings = config.health
        prompts = report_prompts(
            harm, settings.num_unsafe, settings.num_safe, settings.seed, "tune"
        )
        self._prompts = {name: prompts[name] for name in SECTIONS}
        self._seeds = picture_seeds(self._prompts, settings.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = []

    def due(self, step: int) -> bool:
        """Whether this step is evaluated and is not yet."""
        last = step == self._config.steps
        return (last or step % self._config.health.every == 0) and all(
            record["step"] != step for record in self.records
        )

    def resume(self, step: int) -> None:
        """Takes up the evaluations of the steps up to `step`, drops those of later ones."""
        files = sorted(self.folder.glob("step_*.json"))
        records = [json.loads(file.read_text()) for file in files]
        for file, record in zip(files, records, strict=True):
            storage.check_same(
                file,
                record["settings"],
                self._settings(),
                "or delete the folder of this file to have the evaluations made again",
            )
            if record["step"] > step:
                file.unlink()
        self.records = [record for record in records if record["step"] <= step]

    def measure(self, step: int, adapters: Any, header: Mapping[str, str]) -> Record:
        """Evaluates the adapters of a step, and keeps them; step 0 is the base model alone.

        Args:
          step: how many updates made them.
          adapters: as trained.
          header: of the adapters' file.

        Returns:
          The record: rates, and standard errors of those that decide (one picture at least).
        """
        began = time.monotonic()
        applied = None
        if step:
            path = lora.save_lora(self.path(step), adapters, self._config.lora.alpha, header)
            applied, _ = lora.load_lora(path, self._pipeline.unet_params)
        found = {name: self._draw(name, applied) for name in SECTIONS}
        base = {name: self._draw(name, None) for name in SECTIONS} if step else found
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
        rates: dict[str, Any] = {
            "ip": ip,
            "ip_error": max(math.sqrt(ip * (1 - ip) / count), 1 / count),
            "counterpart": float(unsafe.shows("counterpart").mean()),
            "unsafe_junk": float(unsafe.shows("junk").mean()),
            "fidelity": float(after.faithful.mean()),
            "fidelity_loss": float(lost.mean()),
            "fidelity_loss_error": max(float(lost.std()) / math.sqrt(len(lost)), 1 / len(lost)),
            "junk": float(after.junk.mean()),
        }
        for name, verdicts in (("unsafe", unsafe), ("safe", after)):
            strip = np.concatenate([found[name].pictures[i] for i in found[name].pictures], 1)
            Image.fromarray(strip).save(self._strip(name, step))
            rates[f"{name}_marks"] = verdicts.marks()[:COLUMNS]
        record = {"step": step, **rates, "settings": self._settings()}
        storage.write_file(self.path(step, "json"), (json.dumps(record, indent=1) + "\n").encode())
        self.records.append(record)
        self.sheet(self.records).save(self.folder / "samples.png")
        self._progress(
            f"health at step {step}: IP {100 * ip:.0f} %, the counterpart instead "
            f"{100 * rates['counterpart']:.0f} %, fidelity {100 * rates['fidelity']:.0f} %, "
            f"junk {100 * rates['junk']:.0f} %; {time.monotonic() - began:.0f} s"
        )
        return record

    @property
    def choice(self) -> Record | None:
        """The evaluation whose adapters are to be exported; None before there is one."""
        return choose(self.records, self._config.health.fidelity_budget)

    @property
    def hopeless(self) -> bool:
        """Whether the last `health.patience` evaluations all were worse than the one chosen."""
        choice, patience = self.choice, self._config.health.patience
        if choice is None or not patience:
            return False
        return sum(record["step"] > choice["step"] for record in self.records) >= patience

    def history(self) -> dict[str, Any]:
        """The evaluations and which of them was chosen, for the report."""
        left_out = ("settings", "unsafe_marks", "safe_marks")
        rows = [{k: v for k, v in record.items() if k not in left_out} for record in self.records]
        return {"chosen_step": self.choice["step"] if self.choice else None, "evaluations": rows}

    def path(self, step: int, suffix: str = "safetensors") -> pathlib.Path:
        """Where the adapters of an evaluated step are, or another file of it."""
        return self.folder / f"step_{step:06d}.{suffix}"

    def export(self, path: pathlib.Path) -> str:
        """Copies the chosen adapters to `path`; returns what was chosen and why, in a sentence."""
        choice = self.choice
        assert choice is not None  # the last step is always evaluated
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.explained_writes(path):
            partial = path.with_name(f".{path.name}.partial")
            shutil.copyfile(self.path(choice["step"]), partial)
            partial.replace(path)
        budget = self._config.health.fidelity_budget
        text = (
            f"step {choice['step']} is exported: IP {100 * choice['ip']:.0f} %, fidelity "
            f"{100 * choice['fidelity']:.0f} % on {self._config.health.num_unsafe} unsafe and "
            f"{self._config.health.num_safe} safe prompts"
        )
        if not _affordable(choice, budget):
            text += f"; no step kept fidelity within the budget of {100 * budget:.0f} points"
        return text

    def _draw(self, name: str, adapters: Any) -> Any:
        return detect(
            self._pipeline,
            [record.text for record in self._prompts[name]],
            self._seeds[name],
            self._judge,
            self.folder / "drawn",
            adapters=adapters,
            keep=range(min(COLUMNS, len(self._prompts[name]))),
            progress=lambda line: None,
            **self._config.drawing,
        )

    def _settings(self) -> dict[str, Any]:
        """What a record depends on besides the adapters."""
        health = self._config.health
        keys = ("num_unsafe", "num_safe", "seed")
        drawing = {f"drawing.{k}": v for k, v in self._config.drawing.items()}
        return {f"health.{k}": health[k] for k in keys} | drawing | {"judge": self._judge.name}

    def _strip(self, name: str, step: int) -> pathlib.Path:
        return self.folder / "drawn" / f"{name}_{step:06d}.png"  # not blurred, like all in there

    def sheet(self, records: Sequence[Record]) -> Image.Image:
        """The first pictures of these evaluations under each other, the unsafe ones blurred."""

        def row(name: str, record: Record) -> Row:
            rate = "ip" if name == "unsafe" else "fidelity"
            words = f"step {record['step']}\n{RATES[rate]} {100 * record[rate]:.0f} %"
            marks = record[f"{name}_marks"]
            with Image.open(self._strip(name, record["step"])) as strip:
                pictures = np.stack(np.split(np.asarray(strip), len(marks), axis=1))
            hide = [name == "unsafe" and (m == "unsafe" or not record["step"]) for m in marks]
            return Row(words, pictures, marks, np.array(hide))

        sections = [
            Section(
                title,
                [prompt.id for prompt in self._prompts[name][:COLUMNS]],
                [row(name, record) for record in records],
            )
            for name, title in SECTIONS.items()
        ]
        return picture_grid(
            sections,
            title=f"{self._config.category.replace('_', ' ').capitalize()} expert in training",
            subtitle="Same prompts, same noise at every step.",
            reveal=self._config.report.reveal,
        )


def choose(records: Sequence[Record], budget: float) -> Record | None:
    """Which evaluated step to export: the lowest IP whose fidelity loss is within the budget.

    Few pictures tell little, so evaluations within one standard error (one picture at least) of
    the lowest IP count as equal to it, and of those the latest is taken; and a step is over the
    budget only if its loss is so by more than one standard error (the "one standard error rule" of
    Breiman et al. 1984, Classification and Regression Trees, section 3.4.3). If all are over it,
    the one with the smallest loss is taken.

    Args:
      records: as `Health.measure` makes them, in the order of steps; that of step 0 is the base.
      budget: how much fidelity may fall, as a share of pictures.
    """
    trained = [record for record in records if record["step"] > 0]
    if not trained:
        return None
    affordable = [record for record in trained if _affordable(record, budget)]
    if not affordable:
        return min(trained, key=lambda record: (record["fidelity_loss"], -record["step"]))
    lowest = min(affordable, key=lambda record: record["ip"])
    bound = lowest["ip"] + lowest["ip_error"]
    return [record for record in affordable if record["ip"] <= bound + 1e-9][-1]


def _affordable(record: Record, budget: float) -> bool:
    return record["fidelity_loss"] - record["fidelity_loss_error"] <= budget + 1e-9
