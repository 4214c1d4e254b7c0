"""Experts that are trained as one: same settings, one state, one compiled step.

One expert alone is a cohort of one, whose arrays have no axis of experts. Several share the base
and the forward passes and nothing else; see `step.make_train_step`.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from safetydpo_jax import host_memory, lora, processes, sharding
from safetydpo_jax.compilation import tracing
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora import Adapters
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.train import notices
from safetydpo_jax.train.expert import Expert
from safetydpo_jax.train.flops import step_flops
from safetydpo_jax.train.guard import Guard
from safetydpo_jax.train.metrics import MetricsLog
from safetydpo_jax.train.state import Checkpoints, TrainState, make_optimizer
from safetydpo_jax.train.step import Batch, Numbers, make_train_step, numbers_of
from safetydpo_jax.train.workdir import Phases, Stop, stop_signal

STATES = 2  # version of what checkpoints hold: since the second the optimiser counts no steps
# Of several experts: since the third they say by what rule one of them was held.
STATES_OF_SEVERAL = 3
_HOLDING = ("every", "patience", "fidelity_budget")  # in config.health


class Cohort:
    """The training of some experts whose configs differ in what they learn alone.

    Args:
      experts: at least one.
      pipeline: the base model.
      mesh: that the step runs on.
      checkpoints: the folder for their common state.
      phases: to announce.
      saved: called when a checkpoint is written.

    Raises:
      UserError: a setting that cannot be.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        pipeline: Any,
        mesh: Mesh,
        checkpoints: pathlib.Path,
        phases: Phases,
        saved: Callable[[], None],
    ):
        self.experts, self._config = experts, experts[0].config
        self._pipeline, self._mesh, self._phases = pipeline, mesh, phases
        self._checkpoints_folder, self._saved = checkpoints, saved
        several = len(experts) if self.several else None
        self._step_fn = make_train_step(
            pipeline.unet, pipeline.schedule, self._config, mesh, several
        )
        first = [expert.first_adapters() for expert in experts]
        phases.progress(
            f"{self._config.model}: {lora.count(pipeline.unet_params):,} parameters in the UNet; "
            f"adapters of {lora.describe(first[0])}, {lora.count(first[0]):,} parameters"
            + (f" each, for {', '.join(e.config.category for e in experts)}" if several else "")
            + (f", from {self._config.lora.init}" if self._config.lora.init else "")
        )
        adapters = self._stacked(first, axis=0)
        optimizer = make_optimizer(self._config)
        state = TrainState.create(adapters, optimizer, several=self.several)
        self._set_state(state)

    def _set_state(self, state: TrainState) -> None:
        self._state = sharding.put(state, sharding.replicated(self._mesh))

    @property
    def several(self) -> bool:
        """Whether arrays have an axis of experts."""
        return len(self.experts) > 1

    def adapters(self) -> list[Adapters]:
        """Each expert's, as they are now, not yet scaled."""
        adapters = jax.device_get(self._state.adapters)
        return [self._of(i, adapters) for i in range(len(self.experts))]

    def open_checkpoints(self) -> None:
        """Finds them, once there are pairs, and before a cache is encoded that they may not want.

        Raises:
          UserError: they are of other settings.
        """
        config = self._config
        keys = processes.first(lambda: [expert.cache_key() for expert in self.experts])
        settings = [e.settings_with(key) for e, key in zip(self.experts, keys, strict=True)]
        of_all = settings[0]
        if self.several:
            names = [expert.config.category for expert in self.experts]
            of_all = _flat(dict(zip(names, settings, strict=True)))
            # A state in which one is held is of the rule by which it is.
            of_all |= {f"health.{k}": config.health[k] for k in _HOLDING}
        self._checkpoints = Checkpoints(
            self._checkpoints_folder,
            of_all,
            keep=config.checkpoint.keep,
            version=STATES_OF_SEVERAL if self.several else STATES,
        )
        self._checkpoints.check()

    def restore(self) -> None:
        """Takes up the state where it was left, and the experts' evaluations until then.

        Raises:
          UserError: evaluations of other settings, or more steps than are wanted.
        """
        config, progress = self._config, self._phases.progress
        saved = self._checkpoints.restore(self._state)
        if saved:
            self._set_state(saved)
        done = self._kept = int(self._state.step)
        names = ", ".join(e.config.category for e in self.experts) + ": " if self.several else ""
        progress(f"{names}going on from step {done}" if done else f"{names}a new run")
        if done > config.steps:
            raise UserError(
                f"{self._checkpoints.path} is at step {done}, past config.steps = {config.steps}: "
                "raise config.steps, choose another --workdir, or delete that folder to start anew"
            )
        for expert in self.experts:
            processes.first(expert.write_config)
            if expert.health:
                expert.health.resume(done if saved else -1)  # not even of another base model

    def train(self, title: str) -> None:
        """Makes the steps that are left, as long as there is hope; `title` is said in the phases.

        Raises:
          UserError: a diverged run.
          SystemExit: stopped by SIGTERM or Ctrl-C; the state is saved.
        """
        done = int(self._state.step)
        if ended := self._hopeless and done < self._config.steps:
            further = "" if self.several else f": 0 goes on to step {self._config.steps}"
            self._phases.progress(
                f"stopped early at step {done}, by config.health.patience = "
                f"{self._config.health.patience}{further}"
            )
        left = done < self._config.steps and not ended
        if left or any(expert.due(done) for expert in self.experts):
            self._train(done, title)

    @property
    def _hopeless(self) -> bool:
        return all(expert.hopeless for expert in self.experts)

    def _train(self, start: int, title: str) -> None:
        config, params, progress = self._config, self._pipeline.unet_params, self._phases.progress
        for expert in self.experts:
            expert.make_reference(self._mesh)
        self._phases.begin(f"compile{title}")
        batches = self._batches(start)
        null = sharding.put(self.experts[0].cache.null, sharding.replicated(self._mesh))
        batch, numbers = next(batches), numbers_of(config)
        compiled, flops = self._compile(batch, null, numbers(0))

        self._phases.begin(f"train{title}")
        guards = [Guard(e.config, self._checkpoints.path) for e in self.experts]
        largest = processes.Largest(self._mesh)
        with contextlib.ExitStack() as stack:
            logs = []  # of a job's processes the first writes them

            def open_logs() -> None:
                for expert in self.experts:
                    logs.append(stack.enter_context(self._log(expert, start, flops)))

            processes.first(open_logs)
            stop = stack.enter_context(stop_signal())
            stack.enter_context(notices.heeded(stop, progress))
            watch = stack.enter_context(processes.Watch(config.guard.hang_seconds))
            if start == 0:
                self._save(0)
                watch.alive()

            def check(step: int, metrics: Any, wait_time: float) -> None:
                metrics = jax.device_get(metrics)
                watch.alive()
                of_each = [self._of(i, metrics) for i in range(len(self.experts))]
                of_each = [{k: float(v) for k, v in values.items()} for values in of_each]
                for log, values in zip(logs, of_each, strict=bool(logs)):
                    log.write(step, values, wait_time)
                for expert, guard, values in zip(self.experts, guards, of_each, strict=True):
                    if not expert.hopeless:  # alone it would have stopped
                        guard.check(step, values)

            for expert, log in zip(self.experts, logs, strict=bool(logs)):
                if expert.health:
                    for record in expert.health.records:
                        if record["step"] == start:  # a kill may have come before the log had it
                            log.write_health(start, record, expert.health.sheet([record]))
            stopped = self._evaluate(start, logs, stop, watch)
            self._leave_if_stopped(stopped, start)
            pending, wait_time, held = None, 0.0, self._to_hold()
            for step in range(start + 1, config.steps + 1):
                if self._hopeless:
                    progress(f"stopped early at step {step - 1}: the last evaluations were worse")
                    return
                stopped_by = largest.ask(lambda: stop.asked or 0)  # a signal may come at any moment
                self._state, metrics = compiled(self._state, params, batch, null, numbers(step - 1))
                if held:
                    self._state = _hold(self._state, *held)
                # While the device works on this step, read the last one's numbers and the next
                # batch.
                if pending:
                    check(*pending)
                pending = (step, metrics, wait_time)
                stopped = stopped_by()
                last = step == config.steps or stopped > 0
                if not last:
                    asked = time.monotonic()
                    batch = next(batches)
                    wait_time = time.monotonic() - asked
                evaluated = any(expert.due(step) for expert in self.experts)
                if last or evaluated or step % config.checkpoint.every == 0:
                    check(*pending)
                    pending = None
                    # A run that is going wrong must not push out the last good checkpoint.
                    calm = [
                        guard.calm or expert.hopeless
                        for guard, expert in zip(guards, self.experts, strict=True)
                    ]
                    if step == config.steps or all(calm):
                        self._save(step)
                        watch.alive()
                if step < config.steps:
                    self._leave_if_stopped(stopped, step)
                if evaluated:
                    stopped = self._evaluate(step, logs, stop, watch)
                    self._leave_if_stopped(stopped, step)
                    held = self._to_hold()
            self._leave_if_stopped(processes.any_of(stop.asked or 0), config.steps)

    def _compile(self, batch: Batch, null: Conditioning, numbers: Numbers) -> tuple[Any, float]:
        """The step for such batches, and its FLOPs."""
        config, params = self._config, self._pipeline.unet_params
        began = time.monotonic()
        # The mesh in context is the one over which attention spreads a kernel of its own.
        with jax.default_matmul_precision(config.matmul_precision), jax.set_mesh(self._mesh):
            with tracing():
                lowered = self._step_fn.lower(self._state, params, batch, null, numbers)
            with concurrent.futures.ThreadPoolExecutor() as meanwhile:
                shape = batch["winner"]["mean"].shape[-3:]
                flops_of = meanwhile.submit(
                    step_flops, self._pipeline.unet, params, shape, null, config
                )
                compiled = lowered.compile()
            flops = flops_of.result() * len(self.experts)
        seconds = time.monotonic() - began
        host_memory.give_back()
        self._phases.progress(f"compiled in {seconds:.1f} s; {flops / 1e12:.3f} TFLOP a step")
        processes.meet()
        return compiled, flops

    def _to_hold(self) -> tuple[Any, ...]:
        """Which experts are without hope, and a copy of the state; () if none is.

        Alone each would have stopped there. What it might diverge to later would reach the others.
        """
        hopeless = np.array([expert.hopeless for expert in self.experts])
        return (hopeless, jax.tree.map(jnp.copy, self._state)) if hopeless.any() else ()

    def _save(self, step: int) -> None:
        """Of a job, if all processes have the same: what went wrong in one must not be kept."""
        if jax.process_count() > 1:
            found = _fingerprint(self._state.adapters)
            processes.check_same({f"the adapters of step {step}": found})
        self._checkpoints.save(self._state)
        self._kept = step
        processes.first(self._saved)

    def _batches(self, start: int) -> Iterator[Batch]:
        """On the mesh, the experts' batches side by side: (rows, experts, ...)."""
        each = [expert.batches(start, self._mesh) for expert in self.experts]
        for batches in zip(*each, strict=True):
            yield sharding.put_rows(self._stacked(batches, axis=1), self._mesh)

    def _log(self, expert: Expert, start: int, flops: float) -> MetricsLog:
        """The steps' times are those of the whole cohort, pairs and FLOPs the expert's own."""
        config, flops = expert.config, flops / len(self.experts)
        rows = config.batch_size * config.accumulation
        return MetricsLog(expert.workdir, config, start, rows, flops, expert.progress)

    def _evaluate(
        self, step: int, logs: Sequence[MetricsLog], stop: Stop, watch: processes.Watch
    ) -> int:
        """Evaluates the experts that are due, until a signal: those that are left are due again.

        The time is taken out of all their steps' speed. Returns the signal, or 0.
        """
        stopped = 0
        due = [expert.due(step) for expert in self.experts]
        adapters = self.adapters() if any(due) else []
        for i, expert in enumerate(self.experts):
            if due[i]:
                record = expert.measure(step, adapters[i])
                watch.alive()
                assert expert.health is not None
                if logs:
                    logs[i].write_health(step, record, expert.health.sheet([record]))
                if stopped := processes.any_of(stop.asked or 0):
                    break
        for log in logs:
            log.pause_ends()
        return stopped

    def _leave_if_stopped(self, stopped: int, step: int) -> None:
        if stopped:
            wrong = f" at step {step}, which had begun to go wrong" if self._kept < step else ""
            self._phases.progress(
                f"stopped by {signal.Signals(stopped).name}{wrong}: step {self._kept} is saved in "
                f"{self._checkpoints.path}; the same command goes on from there"
            )
            raise SystemExit(128 + stopped)

    def _stacked(self, trees: Sequence[Any], axis: int) -> Any:
        """The experts' trees as one; a single expert's as it is."""
        if not self.several:
            return trees[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)

    def _of(self, i: int, tree: Any) -> Any:
        """An expert's part of a tree of arrays on the host."""
        return jax.tree.map(lambda x: x[i], tree) if self.several else tree


@functools.partial(jax.jit, donate_argnums=0)
def _hold(state: TrainState, which: Array, before: TrainState) -> TrainState:
    """The state with these experts' adapters and moments as they were before."""

    def held(new: Array, old: Array) -> Array:
        return jnp.where(which.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    learnt = (state.adapters, state.opt_state), (before.adapters, before.opt_state)
    return TrainState(state.step, *jax.tree.map(held, *learnt))


def _fingerprint(tree: Any) -> str:
    """Of what each of this process's devices has of arrays that are whole on all."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            digest.update(np.asarray(shard.data).tobytes())
    return digest.hexdigest()[:16]


def _flat(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}, {key}": x for name, of_one in settings.items() for key, x in of_one.items()}
