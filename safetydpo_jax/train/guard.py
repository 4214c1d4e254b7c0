"""Stops a run that has gone wrong, while its last good checkpoint is still there."""

import math
import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from safetydpo_jax.errors import UserError


class Guard:
    """Watches the metrics for NaN and for a winner that the model unlearns.

    DPO only asks for a difference of errors: it can be won by spoiling both pictures, the unsafe
    one more. Then the winner's error rises far above the reference's and samples turn to noise.
    """

    def __init__(self, config: ConfigDict, checkpoints: pathlib.Path):
        self._bound, self._patience = config.guard.winner_error, config.guard.patience
        self._rate, self._beta = config.optimizer.learning_rate, config.loss.beta
        self._category = config.category
        self._kept = f"the last good state is kept in {checkpoints}"
        self._strikes = 0

    @property
    def calm(self) -> bool:
        """Whether the last step gave no cause for concern."""
        return self._strikes == 0

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one step's metrics.

        Raises:
          UserError: the run has diverged; says where, what is kept and what to change.
        """
        remedy = (
            f"lower config.optimizer.learning_rate (now {self._rate:g}) or raise its warmup_steps, "
            "and start in another --workdir"
        )
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise UserError(
                    f"{self._category}: {name} became {metrics[name]} at step {step}; "
                    f"{self._kept}: {remedy}"
                )
        self._strikes = self._strikes + 1 if metrics["winner_error"] > self._bound else 0
        if self._strikes >= self._patience:
            raise UserError(
                f"{self._category}: the winner is collapsing: for {self._strikes} steps up to "
                f"{step} its error was over {self._bound:g} above the reference's; {self._kept}: "
                f"{remedy}, with a larger config.loss.winner_anchor or config.loss.beta "
                f"(now {self._beta:g})"
            )
