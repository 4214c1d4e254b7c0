"""The run: from a config to exported, measured experts, in phases that can each be resumed.

Every phase looks in the workdir first, so the same command goes on after a kill, and the adapters
come out bit for bit as if nothing had happened:

    pairs/  cache/  checkpoints/  health/  metrics.jsonl  tensorboard/  export/  report/
    config.json  compiled/ (of a job of several processes)

Where a config names several experts, each has a folder of its own with all this but the
checkpoints, which are those of a cohort of experts: checkpoints/cohort_1 ...
"""

import contextlib
import pathlib
import secrets
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from safetydpo_jax import __version__, data, host_memory, processes, sharding, storage
from safetydpo_jax.compilation import keep_compiled
from safetydpo_jax.errors import UserError, adding
from safetydpo_jax.tensor_file import check_file
from safetydpo_jax.train.base import check_drawable, check_sampler, load_base
from safetydpo_jax.train.cohort import Cohort
from safetydpo_jax.train.expert import Expert
from safetydpo_jax.train.mirror import Workdir
from safetydpo_jax.train.settings import cautions, cohorts_of, resolve_all
from safetydpo_jax.train.workdir import Phases, lock_workdir


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    progress: Callable[[str], None] = lambda line: print(line, flush=True),
    command: str = "",
) -> dict[str, dict[str, Any]]:
    """Trains, exports and measures one expert or several, or goes on where an earlier run ended.

    In a job of several processes (`processes.job`) all call it, with the same config. The first one
    writes, and says how it goes.

    Args:
      config: as `configs/common.py` makes it, or `configs/all_experts.py`.
      workdir: the run's folder; made if needed, used by one run at a time. Of one like
        gs://bucket/folder the run works in a copy (`mirror`).
      progress: takes lines of text.
      command: what the user typed, for the model cards.

    Returns:
      By category, the report's summary; empty if `report.enabled` is False, and in all processes
      but the first.

    Raises:
      UserError: a wrong config or input, settings that differ from the workdir's, a diverged run.
      SystemExit: stopped by SIGTERM or Ctrl-C during training; the state is saved.
    """
    configs = resolve_all(config)
    groups = cohorts_of(configs)
    several = "experts" in config
    shared = configs[0]
    if shared.remat:
        host_memory.share_one_arena()  # before JAX starts its threads
    if not processes.is_first():
        progress = lambda line: None  # noqa: E731
    phases = Phases(progress, total=7 + 2 * len(groups))
    home = Workdir(workdir, progress)
    workdir = home.folder

    phases.begin("config and workdir")
    if jax.process_count() == 1:
        keep_compiled()
    _check_configs(configs, home.address)
    mesh = sharding.make_mesh(shared.mesh.data, shared.mesh.fsdp, shared.mesh.tensor)
    with home.named(), contextlib.ExitStack() as stack:
        processes.first(lambda: stack.enter_context(lock_workdir(workdir)))
        processes.first(home.fetch)
        if jax.process_count() > 1 and (home.address or _is_shared(workdir, configs)):
            keep_compiled(f"{home.address or workdir}/compiled")
        processes.each(lambda: _check_inputs(configs, mesh))
        devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
        if (count := jax.process_count()) > 1:
            devices += f" in {count} processes"
        what = ", ".join(c.category for c in configs)
        where = f"{home.address} ({workdir})" if home.address else workdir
        progress(f"{what}, recipe {shared.recipe}, {where}, {devices}")
        for line in cautions(configs):
            progress(line)

        phases.begin("base model")
        rules = shared.mesh.rules
        places = lambda shapes: sharding.param_shardings(mesh, shapes, rules)  # noqa: E731
        pipeline = processes.each(lambda: load_base(shared, progress, unet_shardings=places))
        if shared.remat:
            pipeline.networks["unet"] = pipeline.unet.clone(remat=True)
        evaluated = any(config.health.every or config.report.enabled for config in configs)
        to_draw = evaluated or any(not config.pairs.path for config in configs)
        drawing = pipeline.on_this_host(mesh, to_draw=to_draw)

        def expert_of(config: ConfigDict) -> Expert:
            if not several:
                return Expert(config, workdir, pipeline, drawing, progress, home.address)
            name = config.category
            say = lambda line: progress(f"{name}: {line}")  # noqa: E731
            address = home.address and f"{home.address}/{name}"
            return Expert(config, workdir / name, pipeline, drawing, say, address)

        def make_cohorts() -> list[Cohort]:
            cohorts = []
            for i, group in enumerate(groups, 1):
                folder = workdir / "checkpoints" / (f"cohort_{i}" if several else "")
                experts = [expert_of(config) for config in group]
                saved = lambda: home.update(must=False)  # noqa: E731
                cohorts.append(Cohort(experts, pipeline, mesh, folder, phases, saved))
            for config in configs:
                data.check_resolution(config, pipeline.vae)
                if to_draw:
                    check_sampler(config, pipeline.schedule)
            if to_draw:
                check_drawable(shared, pipeline)
            return cohorts

        cohorts = processes.each(make_cohorts)
        experts = [expert for cohort in cohorts for expert in cohort.experts]

        phases.begin("pairs")
        for expert in experts:
            expert.make_pairs()
            processes.first(home.update)

        phases.begin("cache")
        for cohort in cohorts:
            cohort.open_checkpoints()
        for expert in experts:
            expert.make_cache()
            processes.first(home.update)
        for expert in experts:
            expert.open_cache()
        if not evaluated:
            for loaded in (pipeline, drawing):
                loaded.forget_all_but_unet()
        settings = storage.digest([expert.settings for expert in experts])[:16]
        processes.check_same({"the settings, the base model or the pairs": settings})

        phases.begin("state")
        for cohort in cohorts:
            cohort.restore()

        for i, cohort in enumerate(cohorts, 1):
            cohort.train(f" {i}" if len(cohorts) > 1 else "")

        summaries = {}

        def finish() -> None:
            phases.begin("export")
            for cohort in cohorts:
                for expert, adapters in zip(cohort.experts, cohort.adapters(), strict=True):
                    expert.export(adapters)
            home.update()

            phases.begin("report")
            summaries.update({e.config.category: e.report(command) for e in experts})
            home.update()

        processes.first(finish)
        if processes.is_first():
            phases.end()
            for expert in experts:
                progress(expert.made())
            if home.address:
                progress(f"all of it     {home.address}")
            progress(phases.table())
    return summaries


def _is_shared(workdir: pathlib.Path, configs: list[ConfigDict]) -> bool:
    """Whether all processes see one folder; raises UserError if they must, for the cache."""
    file = workdir / ".job"

    def leave() -> str:
        mark = secrets.token_hex(8)
        storage.write_file(file, mark.encode())
        return mark

    mark = processes.first(leave)
    unseen = processes.any_of(not (file.is_file() and file.read_text() == mark))
    if unseen and not all(config.cache.path for config in configs):
        raise UserError(
            f"{workdir} is not one folder for all processes, so that they do not see the cache: "
            "give a --workdir on a disk that they share, or a cache that all can read, made before "
            "by launch/cache.py, as --config.cache.path=gs://BUCKET/FOLDER"
        )
    return not unseen


def _check_inputs(configs: list[ConfigDict], mesh: Mesh) -> None:
    """Raises UserError, before a base is fetched, for what is wrong whatever that is."""
    for config in configs:
        sizes = {k: config[k] for k in ("batch_size", "preserve_batch_size")}
        with adding(_same_update(config, sharding.num_batch_shards(mesh))):
            sharding.check_batch(mesh, **sizes)
        if config.pairs.path and processes.is_first():  # whose card tells all
            data.check_pairs(config, data.open_pairs(config.pairs.path))
        if config.lora.init:
            check_file(pathlib.Path(config.lora.init))


def _same_update(config: ConfigDict, shards: int) -> str:
    """How the same rows an update divide over devices, for an error; "" if they cannot."""
    turns = config.accumulation
    rows = [config[k] * turns for k in ("batch_size", "preserve_batch_size")]
    for fewer in range(turns, 0, -1):
        if all(count % (fewer * shards) == 0 for count in rows):
            batch, preserved = (count // fewer for count in rows)
            also = f"--config.preserve_batch_size={preserved} " if preserved else ""
            return (
                f"; --config.batch_size={batch} {also}--config.accumulation={fewer} is the same "
                "update (for a new run: one that has begun keeps its own)"
            )
    return ""


def _check_configs(configs: list[ConfigDict], address: str) -> None:
    """Raises UserError if processes would not do the same; where their files are is their own.

    But for an address, as one without would go other ways.
    """

    def steering(config: ConfigDict) -> dict[str, Any]:
        values = config.copy_and_resolve_references()
        values.model = values.vae = values.harm = values.lora.init = ""
        values.pairs.path, values.cache.path = (
            str(bool(section.path)) for section in (config.pairs, config.cache)
        )
        values.reference.path = ""
        return values.to_dict()

    processes.check_same(
        {
            "the versions of safetydpo_jax and JAX": f"{__version__}, {jax.__version__}",
            "the config": storage.digest([steering(config) for config in configs])[:16],
            "--workdir": address or "a folder",
        }
    )
