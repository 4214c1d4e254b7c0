"""Is the expert any good yet? Small evaluations while it trains, and which state to export.

Every few steps the same prompts are drawn from the same noise, by the adapters as they are then.
What comes of it lies in the workdir's health/ and in TensorBoard:

    step_000125.safetensors   the adapters, as diffusers loads them
    step_000125.json          IP, fidelity and junk there
    samples.png               the first pictures of every evaluation under one another
"""

import json
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from safetydpo_jax import lora, processes, storage
from safetydpo_jax.evaluate.exam import EmojiExam, SampleExam, Shown
from safetydpo_jax.evaluate.pictures import Row, Section, picture_grid

Record = dict[str, Any]
RATES = {"Unsafe prompts": "ip", "Safe prompts": "fidelity"}  # what stands beside a row


class Health:
    """The small evaluations of one run: of a job's processes the first makes them.

    Args:
      config: from `settings.resolve`.
      pipeline: the base model.
      workdir: of the run.
      progress: takes lines of text.

    Raises:
      UserError: a setting that cannot be.
    """

    def __init__(
        self,
        config: ConfigDict,
        pipeline: Any,
        workdir: pathlib.Path,
        progress: Callable[[str], None],
    ):
        self._config, self._pipeline, self._progress = config, pipeline, progress
        self.folder = workdir / "health"
        if processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
        exam = EmojiExam if config.base == "emoji" else SampleExam
        self._exam = exam(config, pipeline, self.folder / "drawn")
        self.records: list[Record] = []

    def due(self, step: int) -> bool:
        """Whether this step is evaluated and is not yet."""
        last = step == self._config.steps
        return (last or step % self._config.health.every == 0) and all(
            record["step"] != step for record in self.records
        )

    def resume(self, step: int) -> None:
        """Takes up the evaluations of the steps up to `step`, drops those of later ones.

        Raises:
          UserError: they were made with other settings.
        """
        self.records = processes.first(lambda: self._found(step))

    def _found(self, step: int) -> list[Record]:
        records = []
        for file in sorted(self.folder.glob("step_*.json")):
            record = json.loads(file.read_text())
            storage.check_same(
                file,
                record["settings"],
                self._exam.settings,
                "or move the folder of this file away; then only steps still to come are evaluated",
            )
            if record["step"] <= step:
                records.append(record)
        known = {record["step"] for record in records}
        for file in self.folder.rglob("step_*"):
            number = re.match(r"step_(\d+)", file.name)
            if number and int(number[1]) not in known:
                file.unlink()
        return records

    def measure(self, step: int, adapters: Any, header: Mapping[str, str]) -> Record:
        """Evaluates the adapters of a step, and keeps them; step 0 is the base model alone.

        All processes are to call it.

        Args:
          step: how many updates made them.
          adapters: as trained.
          header: of the adapters' file.

        Returns:
          The record: the exam's rates, the step, the settings.
        """
        record = processes.first(lambda: self._measure(step, adapters, header))
        self.records.append(record)
        return record

    def _measure(self, step: int, adapters: Any, header: Mapping[str, str]) -> Record:
        began = time.monotonic()
        applied = None
        if step:
            applied = lora.scaled(adapters, self._config.lora.alpha, self._config.lora.rank)
            lora.save_lora(self.path(step), applied, header)
        rates, shown = self._exam(applied)
        record = {
            "step": step,
            **rates,
            "settings": self._exam.settings,
            "shown": [self._keep(step, i, part) for i, part in enumerate(shown)],
        }
        self.sheet([*self.records, record]).save(self.folder / "samples.png")
        # Last: it stands for the whole evaluation.
        storage.write_file(self.path(step, "json"), (json.dumps(record, indent=1) + "\n").encode())
        said = "pictures drawn"
        if rates:
            said = (
                f"IP {rates['ip']:.0%}, the counterpart instead {rates['counterpart']:.0%}, "
                f"fidelity {rates['fidelity']:.0%}, junk {rates['junk']:.0%}"
            )
        self._progress(f"health at step {step}: {said}; {time.monotonic() - began:.0f} s")
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
        rows = [
            {k: v for k, v in record.items() if k not in ("settings", "shown")}
            for record in self.records
        ]
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
            # Again, as config.report.reveal may be another than when it was measured.
            self.sheet(self.records).save(self.folder / "samples.png")
            storage.write_file(path, self.path(choice["step"]).read_bytes())
        text = f"step {choice['step']} is exported"
        if "ip" in choice:
            text += f": IP {choice['ip']:.0%}, fidelity {choice['fidelity']:.0%} when evaluated"
            budget = self._config.health.fidelity_budget
            if not _affordable(choice, budget):
                text += f"; no step kept fidelity within the budget, {budget:.0%} of the pictures"
        return text

    def sheet(self, records: Sequence[Record]) -> Image.Image:
        """The first pictures of these evaluations under each other, the unsafe ones blurred."""

        def row(record: Record, part: int) -> Row:
            shown = record["shown"][part]
            rate = RATES.get(shown["title"])
            words = f"step {record['step']}" if record["step"] else "base"
            if rate in record:
                words += f"\n{rate} {record[rate]:.0%}".replace("ip", "IP")
            pictures = np.full((len(shown["marks"]), 8, 8, 3), 224, np.uint8)
            strip = self.folder / "drawn" / shown["strip"]
            if strip.is_file():  # else somebody removed them, as they are unblurred: grey
                with Image.open(strip) as image:
                    pictures = np.stack(np.split(np.asarray(image), len(pictures), axis=1))
            return Row(words, pictures, shown["marks"], np.array(shown["hide"]))

        sections = [
            Section(shown["title"], shown["labels"], [row(record, i) for record in records])
            for i, shown in enumerate(records[0]["shown"])
        ]
        return picture_grid(
            sections,
            title=f"{self._config.category.replace('_', ' ').capitalize()}, in training",
            subtitle="Same prompts, same noise at every step.",
            reveal=self._config.report.reveal,
        )

    def _keep(self, step: int, part: int, shown: Shown) -> dict[str, Any]:
        """Writes the pictures side by side, as they are; returns what else a sheet needs."""
        strip = f"step_{step:06d}_{part}.png"
        (self.folder / "drawn").mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(shown.pictures, 1)).save(self.folder / "drawn" / strip)
        return {
            "title": shown.title,
            "labels": shown.labels,
            "marks": shown.marks,
            "hide": shown.hide.tolist(),
            "strip": strip,
        }


def choose(records: Sequence[Record], budget: float) -> Record | None:
    """Which evaluated step to export: the lowest IP whose fidelity loss is within the budget.

    Few pictures tell little, so evaluations within one standard error (one picture at least) of
    the lowest IP count as equal to it, and of those the latest is taken; and a step is over the
    budget only if its loss is so by more than one standard error (the "one standard error rule" of
    Breiman et al. 1984, Classification and Regression Trees, section 3.4.3). If all are over it,
    the one with the smallest loss is taken. Without rates it is the last step.

    Args:
      records: as `Health.measure` makes them, in the order of steps; that of step 0 is the base.
      budget: how much fidelity may fall, as a share of pictures.
    """
    trained = [record for record in records if record["step"] > 0]
    if not trained or "ip" not in trained[-1]:
        return trained[-1] if trained else None
    affordable = [record for record in trained if _affordable(record, budget)]
    if not affordable:
        return min(trained, key=lambda record: (record["fidelity_loss"], -record["step"]))
    lowest = min(affordable, key=lambda record: record["ip"])
    bound = lowest["ip"] + lowest["ip_error"]
    return [record for record in affordable if record["ip"] <= bound + 1e-9][-1]


def _affordable(record: Record, budget: float) -> bool:
    return record["fidelity_loss"] - record["fidelity_loss_error"] <= budget + 1e-9
