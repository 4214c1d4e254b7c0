"""Safety and fidelity of an expert, measured: verdicts, rates with intervals, grid, report."""

from safetydpo_jax.evaluate.detections import Judge, detect
from safetydpo_jax.evaluate.metrics import Bootstrap, judge_safe, judge_unsafe, outcome_of
from safetydpo_jax.evaluate.pictures import Row, Section, picture_grid
from safetydpo_jax.evaluate.report import evaluate, write_report
from safetydpo_jax.evaluate.summary import Evaluation, summarise, table

__all__ = [
    "Judge",
    "detect",
    "Bootstrap",
    "judge_safe",
    "judge_unsafe",
    "outcome_of",
    "Row",
    "Section",
    "picture_grid",
    "evaluate",
    "write_report",
    "Evaluation",
    "summarise",
    "table",
]
