"""The report that ends a run: before and after on prompts that training never saw.

Four sets of prompts, each drawn by the base model and by the expert from the same noise:

    unsafe              the harm's unsafe concepts, held-out wordings and combinations
    held_out_concepts   unsafe concepts of the harm that no expert was trained on, if it has any
    safe                ordinary concepts that only evaluation sees
    counterparts        the unsafe set's safe twins, whose concept is the safe counterpart
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safetydpo_jax import storage
from safetydpo_jax.emoji.own_harm import harm_of
from safetydpo_jax.emoji.prompts import PromptRecord, harm_prompts, safe_prompts
from safetydpo_jax.errors import UserError, adding
from safetydpo_jax.evaluate import metrics
from safetydpo_jax.evaluate.detections import Detections, EmojiJudge, Judge, detect
from safetydpo_jax.evaluate.pictures import Row, Section, picture_grid
from safetydpo_jax.evaluate.summary import UNSAFE_SETS, Evaluation, hidden, summarise, table
from safetydpo_jax.harm import Harm

GRID_COLUMNS = 8
SPLITS = ("test", "tune")
SECTIONS = {"unsafe": "Unsafe prompts", "safe": "Safe prompts"}  # sets the grid shows


def report_prompts(
    harm: Harm,
    num_unsafe: int,
    num_safe: int,
    seed: int,
    split: str = "test",
    section: str = "report",
) -> dict[str, list[PromptRecord]]:
    """The four sets; held-out concepts and counterparts get a quarter of the unsafe set's number.

    Args:
        harm: of the unsafe prompts; the safe ones name none of its concepts.
        num_unsafe: number of unsafe prompts.
        num_safe: number of safe ones.
        seed: of the choice of prompts.
        split: "test", or "tune" to choose settings on: other prompts of the same concepts. The
            concepts no expert is trained on are few, and the same in both.
        section: of the config, where the numbers are said; for errors.

    Raises:
        UserError: unknown split, a number below 1, a negative seed, fewer prompts than asked for.
    """
    if split not in SPLITS:
        raise UserError(f"{section}.split is {split!r}: it must be one of {', '.join(SPLITS)}")
    if num_unsafe < 1 or num_safe < 1 or seed < 0:
        raise UserError(
            f"{section}.num_unsafe is {num_unsafe}, {section}.num_safe {num_safe} and "
            f"{section}.seed {seed}: the numbers must be 1 or more, the seed 0 or more"
        )
    few = max(1, num_unsafe // 4)
    with adding(f" (--config.{section}.num_unsafe)"):
        pairs = harm_prompts(harm, num_unsafe, seed, split=split)
        sets = {"unsafe": [unsafe for unsafe, _ in pairs]}
        if any(pair.held_out for pair in harm.concepts):
            held_out = harm_prompts(harm, few, seed, split="held_out_concepts")
            sets["held_out_concepts"] = [unsafe for unsafe, _ in held_out]
    with adding(f" (--config.{section}.num_safe)"):
        sets["safe"] = safe_prompts(num_safe, seed, split=split, avoid=harm.names)
    sets["counterparts"] = [safe for _, safe in pairs[:few]]
    return sets


def prompts_of(config: Any) -> dict[str, list[PromptRecord]]:
    """`report_prompts` for a config's harm and `config.report`."""
    settings = config.report
    return report_prompts(
        harm_of(config), settings.num_unsafe, settings.num_safe, settings.seed, settings.split
    )


def picture_seeds(
    prompts: Mapping[str, Sequence[metrics.Prompt]], seed: int
) -> dict[str, np.ndarray]:
    """Seeds of the initial noise, uint32, one for every prompt of every set."""
    return {
        name: np.random.default_rng([seed, i]).integers(2**32, size=len(records), dtype=np.uint32)
        for i, (name, records) in enumerate(prompts.items())
    }


def evaluate(
    config: Any,
    pipeline: Any,
    adapters: Mapping | None,
    folder: Path,
    *,
    judge: Judge | None = None,
    progress: Callable[[str], None] = print,
    **detect_options: Any,
) -> tuple[Evaluation, dict[str, Section], dict[str, float]]:
    """Draws and judges the four sets before and after; see `write_report` for the arguments.

    Returns:
        The verdicts; the grid's sections by set; seconds of drawing, "before" and "after".
    """
    settings = config.report
    judge = judge or EmojiJudge(harm_of(config).unsafe_names)
    prompts = prompts_of(config)
    seeds = picture_seeds(prompts, settings.seed)

    def drawn_by(model_adapters: Mapping | None, when: str) -> dict[str, Detections]:
        # Set by set: the base's pictures of safe prompts serve all categories in one folder.
        return {
            name: detect(
                pipeline,
                [record.text for record in records],
                seeds[name],
                judge,
                folder,
                adapters=model_adapters,
                keep=range(min(GRID_COLUMNS, len(records))) if name in SECTIONS else (),
                label=f"report, {name.replace('_', ' ')} {when}",
                progress=progress,
                **config.drawing,
                **detect_options,
            )
            for name, records in prompts.items()
        }

    def verdicts(found: Mapping[str, Detections]) -> dict[str, Any]:
        return {name: _verdicts(name, found[name], prompts[name], judge) for name in prompts}

    before, after = drawn_by(None, "before"), drawn_by(adapters, "after")
    evaluation = Evaluation(prompts, verdicts(before), verdicts(after))
    sections = {n: _section(n, evaluation, before[n], after[n]) for n in SECTIONS}
    seconds = {"before": before, "after": after}
    return evaluation, sections, {k: sum(f.seconds for f in v.values()) for k, v in seconds.items()}


def write_report(
    config: Any,
    pipeline: Any,
    adapters: Mapping | None,
    workdir: str | Path,
    *,
    judge: Judge | None = None,
    training: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = print,
    **detect_options: Any,
) -> dict[str, Any]:
    """Evaluates an expert, writes `report/summary.json` and `report/grid.png`, prints a table.

    Args:
        config: with `category`, `harm`, `drawing` (options of `samplers.draw_pictures`) and
            `report.{num_unsafe, num_safe, seed, split, reveal}`.
        pipeline: the base model.
        adapters: the expert's collection, ready to apply; None compares the base with itself.
        workdir: of the run.
        judge: of the pictures; the embedded world's detector if None.
        training: what the summary is to say of the way there, under this name.
        progress: takes lines of text.
        **detect_options: further options of `detections.detect`, such as `draw`.

    Returns:
        The content of summary.json: `summarise`'s rates, sizes, settings and seconds.

    Raises:
        UserError: a setting that cannot be, or pictures that are none.
    """
    started = time.monotonic()
    folder = Path(workdir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    evaluation, sections, seconds = evaluate(
        config,
        pipeline,
        adapters,
        folder / "drawn",
        judge=judge,
        progress=progress,
        **detect_options,
    )
    summary = {
        **summarise([evaluation]),
        "category": config.category,
        **({"training": training} if training else {}),
        "settings": {**config.report, **config.drawing},
        "seconds": {
            **{name: round(value, 1) for name, value in seconds.items()},
            "total": round(time.monotonic() - started, 1),
        },
    }
    grid = picture_grid(
        list(sections.values()),
        title=f"{config.category.replace('_', ' ').capitalize()}: before and after",
        subtitle="Same prompts, same noise. " + _headline(summary),
        reveal=config.report.reveal,
    )
    grid.save(folder / "grid.png")
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    storage.write_file(folder / "summary.json", text.encode())
    progress(table(summary))
    return summary


def _headline(summary: Mapping[str, Any]) -> str:
    ip, fidelity = (
        f"{100 * summary[f'{name}_before']:.0f} % to {100 * summary[f'{name}_after']:.0f} %"
        for name in ("ip", "fidelity")
    )
    return f"Unsafe pictures on unsafe prompts: {ip}. Safe prompts drawn as asked: {fidelity}."


def _verdicts(name: str, found: Detections, records: Sequence[metrics.Prompt], judge: Judge) -> Any:
    if name in UNSAFE_SETS:
        return metrics.judge_unsafe(found.names, found.backgrounds, records, judge.unsafe_names)
    return metrics.judge_safe(found.names, records, judge.unsafe_names)


def _section(name: str, evaluation: Evaluation, before: Detections, after: Detections) -> Section:
    count = len(before.pictures)

    def row(who: str, found: Detections, verdicts: Mapping[str, Any]) -> Row:
        marks = verdicts[name].marks()[:count]
        hide = hidden(name, marks, is_base=who == "base")
        return Row(who, np.stack([found.pictures[i] for i in range(count)]), marks, hide)

    return Section(
        title=SECTIONS[name],
        labels=[record.id for record in evaluation.prompts[name][:count]],
        rows=[
            row("base", before, evaluation.before),
            row("expert", after, evaluation.after),
        ],
    )
