"""What training changes and how it is kept on disk: adapters, optimiser, step."""

import json
import os
import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from safetydpo_jax import processes, storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import Adapters

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "adafactor")


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: updates made so far, int32 ().
      adapters: nested dict, leaves a and b in float32; b without the factor alpha / rank.
      opt_state: the optimiser's moments.

    Of several experts, every leaf but `step` has them as its first axis.
    """

    # Any: the same tree also holds shapes or shardings.
    step: Any
    adapters: Any
    opt_state: Any

    @classmethod
    def create(
        cls, adapters: Adapters, optimizer: optax.GradientTransformation, *, several: bool = False
    ) -> "TrainState":
        """Before the first step; `several`: the adapters are of more than one expert."""
        init = jax.vmap(optimizer.init) if several else optimizer.init
        return cls(jnp.zeros((), jnp.int32), adapters, init(adapters))


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine that reaches 0 at the last step."""
    c = config.optimizer
    rest = optax.constant_schedule(c.learning_rate)
    if c.schedule == "cosine":
        rest = optax.cosine_decay_schedule(c.learning_rate, max(1, config.steps - c.warmup_steps))
    # The first update already moves: its rate is 1 / warmup_steps of the full one.
    first = c.learning_rate / max(1, c.warmup_steps)
    warmup = optax.linear_schedule(first, c.learning_rate, max(1, c.warmup_steps - 1))
    return optax.join_schedules([warmup, rest], [c.warmup_steps])


def make_optimizer(config: ConfigDict, rate: Any = None) -> optax.GradientTransformation:
    """AdamW, or Adafactor as the paper has it for SDXL, on gradients clipped to a global norm.

    Args:
      config: from `settings.resolve`.
      rate: of the next update, which may be traced; None is the config's, whatever its schedule.
    """
    c = config.optimizer
    rate = c.learning_rate if rate is None else rate
    if c.name == "adamw":
        rule = optax.adamw(rate, c.b1, c.b2, weight_decay=c.weight_decay)
    else:
        # transformers' Adafactor with scale_parameter and relative_step off: it factors every
        # matrix, and its learning rate is absolute. It decays no weights.
        rule = optax.adafactor(rate, min_dim_size_to_factor=1, multiply_by_parameter_scale=False)
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), rule)


class Checkpoints:
    """The run's checkpoints: a folder a step, written whole or not at all, the last few kept.

    Each holds the state and the settings that its numbers depend on; a run with other settings, or
    of a program whose states are of another `version`, refuses to go on from it. Of a job's
    processes the first reads and writes, so that another number of them, or another mesh, can go on
    from it.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: dict[str, Any], *, keep: int, version: int = 1
    ):
        self.path = pathlib.Path(path).absolute()
        self._settings = json.loads(json.dumps(settings))
        self._version = version
        self._manager: Any = None  # the first process's

        def open_() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            # Orbax writes to a temporary name and renames: a kill leaves the last whole one there.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=0, active_processes={0}
                ),
            )
            self._manager = ocp.CheckpointManager(self.path, options=options)

        processes.first(open_)

    def save(self, state: TrainState) -> None:
        """Writes the state under its own step, unless it is there."""
        processes.first(lambda: self._write(jax.device_get(state)))

    def _write(self, state: TrainState) -> None:
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            settings=ocp.args.JsonSave(self._settings | {"version": self._version}),
        )
        with storage.explained_writes(self.path):
            self._manager.save(step, args=items)

    def check(self) -> None:
        """Raises UserError if the newest was saved by a run with other settings."""
        processes.first(self._newest)

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, in NumPy; None if nothing was saved.

        Args:
          like: any state of its shapes.

        Raises:
          UserError: it was saved by a run with other settings.
        """
        step = processes.first(self._newest)
        if step is None:
            return None
        like = jax.device_get(like)

        def read() -> None:
            nonlocal like
            only = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            saved: Any = self._manager.restore(step, args=only)
            like = saved.state

        processes.first(read)
        return processes.first_arrays(like)

    def _newest(self) -> int | None:
        """The step of the newest, if it is of these settings."""
        step = self._manager.latest_step()
        if step is not None:
            only = ocp.args.Composite(settings=ocp.args.JsonRestore())
            saved: Any = self._manager.restore(step, args=only)
            if (version := saved.settings.pop("version", 1)) != self._version:
                raise UserError(
                    f"{self.path} was made by another version of this program, whose checkpoints "
                    f"({version}) this one ({self._version}) cannot go on from: end it with that "
                    "one, choose another --workdir, or delete that folder to start anew"
                )
            storage.check_same(
                self.path,
                saved.settings,
                self._settings,
                "choose another --workdir, or delete that folder to start anew",
            )
        return step
