"""The run: from a config to an exported, measured expert, in phases that can each be resumed.

Every phase looks in the workdir first, so the same command goes on after a kill, and the adapters
come out bit for bit as if nothing had happened:

    pairs/  cache/  checkpoints/  health/  metrics.jsonl  tensorboard/  export/  report/
    config.json
"""

import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from safetydpo_jax import __version__, data, host_memory, lora, sharding, storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.train.flops import step_flops
from safetydpo_jax.train.guard import Guard
from safetydpo_jax.train.metrics import MetricsLog
from safetydpo_jax.train.model_card import base_name, write_model_card
from safetydpo_jax.train.settings import deciding, resolve
from safetydpo_jax.train.state import Checkpoints, TrainState, make_optimizer
from safetydpo_jax.train.step import Batch, make_train_step
from safetydpo_jax.train.workdir import Phases, lock_workdir, stop_signal

if TYPE_CHECKING:
    from safetydpo_jax.train.health import Health

LORA_FILE = "pytorch_lora_weights.safetensors"
# What A1111 shows a LoRA for, by `ss_base_model_version`.
KOHYA_BASES = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    progress: Callable[[str], None] = lambda line: print(line, flush=True),
    command: str = "",
) -> dict[str, Any]:
    """Trains, exports and measures one expert, or goes on where an earlier run ended.

    Args:
      config: as `configs/common.py` makes it.
      workdir: the run's folder; made if needed, used by one run at a time.
      progress: takes lines of text.
      command: what the user typed, for the model card.

    Returns:
      The report's summary; empty if `report.enabled` is False.

    Raises:
      UserError: a wrong config or input, settings that differ from the workdir's, a diverged run.
      SystemExit: stopped by SIGTERM or Ctrl-C during training; the state is saved.
    """
    phases = Phases(progress, total=9)

    phases.begin("config and workdir")
    config = resolve(config)
    workdir = pathlib.Path(workdir)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    # The mesh in context is the one over which attention spreads a kernel of its own.
    with jax.set_mesh(mesh), lock_workdir(workdir):
        devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
        progress(f"{config.category}, recipe {config.recipe}, {workdir}, {devices}")

        phases.begin("base model")
        # Everything that can be wrong with the config is found before hours of drawing.
        pipeline = load_pipeline(
            config.model,
            vae=config.vae,
            configs=config.model_config,
            unet_shardings=lambda shapes: sharding.param_shardings(mesh, shapes, config.mesh.rules),
            progress=progress,
        )
        if config.remat:
            pipeline.networks["unet"] = pipeline.unet.clone(remat=True)
        if config.report.enabled:
            # Here, so that a run without a report needs none of what the report needs.
            from safetydpo_jax.evaluate.report import prompts_of

            prompts_of(config)
        health = None
        if config.health.every:
            from safetydpo_jax.train.health import Health

            health = Health(config, pipeline, workdir, progress)
        step_fn = make_train_step(pipeline.unet, pipeline.schedule, config, mesh)
        adapters = _first_adapters(config, pipeline)
        progress(
            f"{config.model}: {lora.count(pipeline.unet_params):,} parameters in the UNet; adapters"
            f" of {lora.describe(adapters)}, {lora.count(adapters):,} parameters"
            + (f", from {config.lora.init}" if config.lora.init else "")
        )

        phases.begin("pairs")
        pairs = data.PairSet(data.make_pairs(config, pipeline, workdir, progress))

        phases.begin("cache")
        cache = data.make_cache(config, pipeline, workdir, progress)
        progress(f"{cache.num_pairs} pairs and {cache.num_preserve} preservation pictures")

        phases.begin("state")
        state = jax.device_put(
            TrainState.create(adapters, make_optimizer(config)), sharding.replicated(mesh)
        )
        model_hash = _model_hash(pipeline)
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            deciding(config, model_hash, cache.key),
            keep=config.checkpoint.keep,
        )
        state = checkpoints.restore(state) or state
        done = int(state.step)
        progress(f"going on from step {done}" if done else "a new run")
        if done > config.steps:
            raise UserError(
                f"{checkpoints.path} is at step {done}, past config.steps = {config.steps}: raise "
                "config.steps, choose another --workdir, or delete that folder to start anew"
            )

        storage.write_file(workdir / "config.json", config.to_json(indent=2).encode() + b"\n")
        if health:
            health.resume(done)
        if (done < config.steps and not (health and health.hopeless)) or (
            health and health.due(done)
        ):
            state = _train(
                config, workdir, phases, step_fn, pipeline, mesh, cache, checkpoints, health, state
            )

        phases.begin("export")
        path = workdir / "export" / LORA_FILE
        card = path.with_name("README.md")
        card.unlink(missing_ok=True)  # until there is one for the file that is now written
        if health:
            exported = health.export(path)
        else:
            exported = f"step {config.steps}, the last, is exported"
            adapters = jax.device_get(state.adapters)
            applied = lora.scaled(adapters, config.lora.alpha, config.lora.rank)
            lora.save_lora(path, applied, _header(config, pipeline, config.steps))
        progress(exported)
        kohya = path.parent / "comfyui" / f"safetydpo_{config.category}.safetensors"
        adapters, header = lora.load_lora(path, pipeline.unet_params)
        lora.save_kohya(kohya, adapters, header, KOHYA_BASES.get(config.base))
        progress(f"{path}, {path.stat().st_size / 1e6:.2f} MB")

        phases.begin("report")
        summary: dict[str, Any] = {}
        if config.report.enabled:
            from safetydpo_jax.evaluate import write_report

            summary = write_report(
                config,
                pipeline,
                adapters,
                workdir,
                training=health.history() if health else None,
                progress=progress,
            )
        write_model_card(
            card,
            config,
            files=[path, kohya],
            adapters=lora.describe(adapters),
            pairs=pairs.card,
            model_hash=model_hash,
            exported=exported,
            summary=summary,
            command=command,
            version=__version__,
        )
        phases.end()
        progress(_made(workdir, health is not None, summary))
        progress(phases.table())
    return summary


def _first_adapters(config: ConfigDict, pipeline: Any) -> lora.Adapters:
    """New ones that change nothing, or those of `config.lora.init`; not yet scaled."""
    if config.lora.init:
        applied, _ = lora.load_lora(config.lora.init, pipeline.unet_params)
        return lora.scaled(applied, config.lora.rank / config.lora.alpha, 1)
    return lora.init_adapters(
        jax.random.key(config.seed, impl="threefry2x32"),
        pipeline.unet_params,
        rank=config.lora.rank,
        targets=config.lora.targets,
    )


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    phases: Phases,
    step_fn: Any,
    pipeline: Any,
    mesh: jax.sharding.Mesh,
    cache: data.Cache,
    checkpoints: Checkpoints,
    health: "Health | None",
    state: TrainState,
) -> TrainState:
    """Compiles the step and makes the updates that are left, as long as health has hope."""
    progress, start = phases.progress, int(state.step)

    phases.begin("compile")
    batches = data.batches(cache, config, start)
    null = jax.device_put(cache.null, sharding.replicated(mesh))

    def on_mesh(batch: Batch) -> Batch:
        return jax.device_put(batch, sharding.batch_sharding(mesh))

    batch = on_mesh(next(batches))
    began = time.monotonic()
    with jax.default_matmul_precision(config.matmul_precision):
        compiled = step_fn.lower(state, pipeline.unet_params, batch, null).compile()
    seconds = time.monotonic() - began
    host_memory.give_back()
    shape = batch["winner"]["mean"].shape[1:]
    flops = step_flops(pipeline.unet, pipeline.unet_params, shape, null, config)
    progress(f"compiled in {seconds:.1f} s; {flops / 1e12:.3f} TFLOP a step")

    phases.begin("train")
    guard = Guard(config, checkpoints.path)
    rows = config.batch_size * config.accumulation
    with MetricsLog(workdir, config, start, rows, flops, progress) as log, stop_signal() as stop:
        if start == 0:
            checkpoints.save(state)

        def evaluate(step: int) -> None:
            if health and health.due(step):
                adapters = jax.device_get(state.adapters)
                record = health.measure(step, adapters, _header(config, pipeline, step))
                log.write_health(step, record, health.sheet([record]))

        def leave_if_stopped(step: int) -> None:
            if stop.asked is not None:
                progress(
                    f"stopped by {stop.asked.name}: step {step} is saved in {checkpoints.path}; "
                    "the same command goes on from there"
                )
                raise SystemExit(128 + stop.asked)

        if health:
            for record in health.records:
                if record["step"] == start:  # a kill may have come before the log had it
                    log.write_health(start, record, health.sheet([record]))
        evaluate(start)
        if health and health.hopeless:
            return state
        pending = None
        for step in range(start + 1, config.steps + 1):
            state, metrics = compiled(state, pipeline.unet_params, batch, null)
            # While the device works on this step, read the last one's numbers and the next batch.
            if pending:
                guard.check(*log.write(*pending))
            pending = (step, metrics)
            stopped_by = stop.asked  # read once: a signal may come at any moment
            last = step == config.steps or stopped_by is not None
            if not last:
                batch = on_mesh(next(batches))
            evaluated = health is not None and health.due(step)
            if last or evaluated or step % config.checkpoint.every == 0:
                guard.check(*log.write(*pending))
                pending = None
                # A run that is going wrong must not push out the last good checkpoint.
                if last or guard.calm:
                    checkpoints.save(state)
            if stopped_by is not None and step < config.steps:
                leave_if_stopped(step)
            if evaluated:
                evaluate(step)
                leave_if_stopped(step)
            if health and health.hopeless and step < config.steps:
                progress(f"stopped early at step {step}: the last evaluations were all worse")
                break
    return state


def _model_hash(pipeline: Any) -> str:
    return storage.hash_parts(pipeline.sources, ("unet", "scheduler"))


def _header(config: ConfigDict, pipeline: Any, step: int) -> dict[str, str]:
    """What the adapters' file says of itself."""
    return {
        "base": base_name(config),
        lora.BASE_HASH: _model_hash(pipeline),
        "category": config.category,
        "recipe": config.recipe,
        "steps": str(step),
    }


def _made(workdir: pathlib.Path, health: bool, summary: dict[str, Any]) -> str:
    lines = [
        f"adapter       {workdir / 'export' / LORA_FILE}, README.md and comfyui/ beside it",
        f"metrics       {workdir / 'metrics.jsonl'}, tensorboard --logdir {workdir}",
    ]
    if health:
        lines.append(f"health        {workdir / 'health' / 'samples.png'}, and adapters on the way")
    if summary:
        lines.append(f"report        {workdir / 'report'}: grid.png, summary.json")
    return "\n".join(lines)
