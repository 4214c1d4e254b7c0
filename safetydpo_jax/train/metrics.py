"""The log of a run: metrics.jsonl, TensorBoard, and lines on the screen."""

import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from safetydpo_jax import storage
from safetydpo_jax.train.board import Board


class MetricsLog:
    """Writes one JSON object a step to `workdir`/metrics.jsonl, and the same to TensorBoard.

    Lines of steps after `start` are removed first: a resumed run makes those steps again, so that
    each step is there exactly once.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: ConfigDict,
        start: int,
        rows: int,
        flops: float,
        progress: Callable[[str], None],
    ):
        self._config, self._rows, self._flops, self._progress = config, rows, flops, progress
        self._start, path = start, workdir / "metrics.jsonl"
        storage.write_file(path, b"".join(lines_until(path, start)))
        # Line by line, so that a kill loses no step that a checkpoint counts as done.
        self._file = path.open("a", buffering=1)
        self._board = Board(workdir / "tensorboard", start + 1)
        self._began = self._last = time.monotonic()
        self._pause = 0.0  # of the last evaluations

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, metrics: Mapping[str, float], wait_time: float) -> None:
        """Logs a step's metrics, which have just come, with its time (s), pairs/s and TFLOP/s.

        Args:
          step: its number.
          metrics: of the step.
          wait_time: seconds of the step's time that its batch was waited for.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        values = dict(metrics) | {
            "step_time": seconds,
            "wait_time": wait_time,
            "pairs_per_s": self._rows / seconds,
            "tflops_per_s": self._flops / seconds / 1e12,
        }
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.scalar(name, value, step)
        self._board.flush()
        if step % self._config.log_every == 0 or step in (self._start + 1, self._config.steps):
            self._show(step, values, (now - self._began) / (step - self._start))

    def write_health(self, step: int, record: Mapping[str, Any], picture: Image.Image) -> None:
        """Logs an evaluation's rates and pictures; `pause_ends` is to follow."""
        for name, value in record.items():
            if isinstance(value, float):
                self._board.scalar(f"health/{name}", value, step)
        self._board.picture("health/samples", np.asarray(picture), step)
        self._board.flush()

    def pause_ends(self) -> None:
        """Takes the time since the last step out of the steps' speed."""
        now = time.monotonic()
        self._pause = now - self._last
        self._began, self._last = self._began + self._pause, now

    def _show(self, step: int, values: Mapping[str, float], mean_seconds: float) -> None:
        left = (self._config.steps - step) * mean_seconds
        if every := self._config.health.every:
            left += self._pause * (-(-self._config.steps // every) - step // every)
        shown = " ".join(
            f"{name} {values[name]:.4g}"
            for name in (
                "loss",
                "margin",
                "implicit_accuracy",
                "winner_error",
                "loser_error",
                "loser_scale",
                "winner_anchor",
                "preservation",
                "grad_norm",
            )
            if name in values
        )
        self._progress(
            f"step {step}/{self._config.steps}: {shown}; {values['step_time']:.2f} s a step, "
            f"{values['pairs_per_s']:.1f} pairs/s, {values['tflops_per_s']:.3f} TFLOP/s, "
            f"{left:.0f} s left"
        )


def lines_until(path: pathlib.Path, step: int) -> list[bytes]:
    """The lines of steps up to `step`; what a kill tore off at the end is left out."""
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [line for line in whole if json.loads(line)["step"] <= step]
