"""One expert of a run: its config and folder, its data, its evaluations, the files it ends in."""

import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from safetydpo_jax import __version__, data, lora, processes, sharding, storage
from safetydpo_jax.data import shelf
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora import Adapters
from safetydpo_jax.train.model_card import base_name, write_model_card
from safetydpo_jax.train.reference import reference_tables
from safetydpo_jax.train.settings import deciding
from safetydpo_jax.train.step import Batch

if TYPE_CHECKING:
    from safetydpo_jax.train.health import Health

LORA_FILE = "pytorch_lora_weights.safetensors"
SEEN_SECONDS = 120  # NFS may hide for a minute what another host has written


class Expert:
    """What a run keeps of one expert besides its training state, which `cohort.Cohort` has.

    Everything that can be wrong with its config is found here, before hours of drawing. In a job of
    several processes each has one; the first alone draws, evaluates and writes.

    Args:
      config: from `settings.resolve`.
      workdir: its folder: pairs/ cache/ health/ metrics.jsonl tensorboard/ export/ report/
        config.json.
      pipeline: the base model, as the step has it.
      drawing: the same, on this process's devices.
      progress: takes lines of text.
      address: of the folder's mirror in a bucket (`mirror`), "" without one.

    Attributes:
      cache: what it trains on, after `open_cache`.
      reference: what the base answers, after `make_reference`; None if that is not known before.
      health: its evaluations on the way; None without them.

    Raises:
      UserError: a setting that cannot be.
    """

    cache: data.Cache
    _pairs: Any
    reference: data.Reference | None
    health: "Health | None"

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        pipeline: Any,
        drawing: Any,
        progress: Callable[[str], None],
        address: str = "",
    ):
        self.config, self.workdir, self.progress = config, workdir, progress
        self._address = address
        self._pipeline, self._drawing = pipeline, drawing
        if config.report.enabled:
            # Here, so that a run without a report needs none of what the report needs.
            from safetydpo_jax.evaluate.report import prompts_of

            prompts_of(config)
        self.health = None
        if config.health.every:
            from safetydpo_jax.train.health import Health

            self.health = Health(config, drawing, workdir, progress)
        self._model_hash = storage.hash_parts(pipeline.sources, ("unet", "scheduler"))

    def make_pairs(self) -> None:
        """Draws its pairs, unless they are there."""

        def make() -> None:
            folder = data.make_pairs(self.config, self._drawing, self.workdir, self.progress)
            self._pairs = data.open_pairs(folder)
            data.mixing_weights(self._pairs.parts, self.config.mix)  # hours before they are needed

        processes.first(make)

    def make_cache(self) -> None:
        """Encodes them, unless that is done: each process its share, if all see the pairs."""
        config, (_, count) = self.config, processes.part()
        # Of a workdir in a bucket other hosts have a copy of nothing yet.
        theirs = config.pairs.path or (f"{self._address}/pairs" if self._address else "")
        shared = not config.cache.path and (not self._address or "://" in theirs)

        def encode_part() -> None:
            own = config.copy_and_resolve_references()
            if not processes.is_first():
                own.pairs.path = theirs
            data.encode_part(
                *(own, self._drawing, self.workdir, self.progress, processes.part()),
                shelf=self._shelf,
            )

        def make() -> None:
            self.cache = data.make_cache(
                config, self._drawing, self.workdir, self.progress, shelf=self._shelf
            )

        def is_wanted() -> bool:
            return shared and not data.is_cached(config, self._drawing, self.workdir)

        if count > 1 and processes.first(is_wanted):
            processes.each(encode_part)
        processes.first(make)

    def open_cache(self) -> None:
        """Opens what the first process has made, and the mirror has, in the others too."""
        key = processes.first(lambda: self.cache.key)

        def open_() -> None:
            if processes.is_first():
                if self._shelf:
                    self._clear_shelf()
                return
            if self._address:  # of several processes on this host the first to come removes it
                partial = self.workdir / "cache.partial" / key[:16]
                shutil.rmtree(partial, ignore_errors=True)
            if address := self.config.cache.path or (self._address and f"{self._address}/cache"):
                self.cache = data.Cache(address)
            else:
                self.cache = _cache_once_seen(self.workdir / "cache", key)

        processes.each(open_)
        self.progress(
            f"{self.cache.num_pairs} pairs and {self.cache.num_preserve} preservation pictures"
        )

    @property
    def _shelf(self) -> str:
        """Where shards lie until there is a cache, of hosts that share no disk."""
        return f"{self._address}/cache.partial" if self._address else ""

    def _clear_shelf(self) -> None:
        """Removes the shards of which the mirror has a cache; who may not delete keeps them."""
        try:
            shelf.clear(self._shelf)
        except UserError as error:
            self.progress(f"{error}; {self._shelf} is left, which nothing needs any more")

    def make_reference(self, mesh: Mesh) -> None:
        """Computes what the base answers, if that is to be known before, unless that is done."""
        self.reference = reference_tables(
            self.config,
            self._pipeline,
            self.cache,
            mesh,
            self.workdir,
            self._model_hash,
            self.progress,
        )

    def batches(self, start: int, mesh: Mesh) -> Iterator[Batch]:
        """From a step on, what it learns in each; this process's rows."""
        shards = sharding.own_batch_shards(mesh), sharding.num_batch_shards(mesh)
        return data.batches(self.cache, self.config, start, shards, self.reference)

    def first_adapters(self) -> Adapters:
        """New ones that change nothing, or those of `config.lora.init`; not yet scaled."""
        config, params = self.config, self._pipeline.unet_params
        if config.lora.init:
            applied, _ = lora.load_lora(config.lora.init, params)
            return lora.scaled(applied, config.lora.rank / config.lora.alpha, 1)
        key = jax.random.key(config.seed, impl="threefry2x32")
        return lora.init_adapters(key, params, rank=config.lora.rank, targets=config.lora.targets)

    @property
    def settings(self) -> dict[str, Any]:
        """What its trained numbers depend on, after `open_cache`."""
        return self.settings_with(self.cache.key)

    def settings_with(self, cache_key: str) -> dict[str, Any]:
        """The same, of a cache that is not there yet."""
        return deciding(self.config, self._model_hash, cache_key)

    def cache_key(self) -> str:
        """Of the cache to come; to be asked in the first process, which alone has the pairs."""
        return data.cache_key(self.config, self._drawing, self._pairs)

    @property
    def hopeless(self) -> bool:
        """Whether its last evaluations say that further steps are in vain."""
        return self.health is not None and self.health.hopeless

    def due(self, step: int) -> bool:
        """Whether it is to be evaluated at this step and is not yet."""
        return self.health is not None and not self.hopeless and self.health.due(step)

    def measure(self, step: int, adapters: Adapters) -> dict[str, Any]:
        """Its evaluation with the adapters as they are at this step."""
        assert self.health is not None
        return self.health.measure(step, adapters, self._header(step))

    def write_config(self) -> None:
        """Leaves its config in its folder."""
        text, file = self.config.to_json(indent=2) + "\n", self.workdir / "config.json"
        with storage.explained_writes(file):
            self.workdir.mkdir(parents=True, exist_ok=True)  # where nothing was made before
        storage.write_file(file, text.encode())

    def export(self, adapters: Adapters) -> None:
        """Writes the LoRA: of the evaluated step that was best, or of these last adapters."""
        config = self.config
        path = self.workdir / "export" / LORA_FILE
        card = path.with_name("README.md")
        card.unlink(missing_ok=True)  # until there is one for the file that is now written
        if self.health:
            self._exported = self.health.export(path)
        else:
            self._exported = f"step {config.steps}, the last, is exported"
            applied = lora.scaled(adapters, config.lora.alpha, config.lora.rank)
            lora.save_lora(path, applied, self._header(config.steps))
        self.progress(self._exported)
        kohya = path.parent / "comfyui" / f"safetydpo_{config.category}.safetensors"
        unet_params = self._pipeline.unet_params
        self._adapters, header = lora.load_lora(path, unet_params)
        lora.save_kohya(kohya, self._adapters, header, lora.kohya_base(unet_params))
        self.progress(f"{path}, {path.stat().st_size / 1e6:.2f} MB")
        self._files = [path, kohya]

    def report(self, command: str) -> dict[str, Any]:
        """Measures what was exported and writes its card; returns the report's summary."""
        summary: dict[str, Any] = {}
        if self.config.report.enabled:
            from safetydpo_jax.evaluate import write_report

            summary = write_report(
                self.config,
                self._drawing,
                self._adapters,
                self.workdir,
                training=self.health.history() if self.health else None,
                progress=self.progress,
            )
        write_model_card(
            self._files[0].with_name("README.md"),
            self.config,
            files=self._files,
            adapters=lora.describe(self._adapters),
            pairs=self._pairs.card,
            model_hash=self._model_hash,
            exported=self._exported,
            summary=summary,
            command=command,
            version=__version__,
        )
        return summary

    def made(self) -> str:
        """What it ended in and where that is."""
        lines = [
            f"adapter       {self._files[0]}, README.md and comfyui/ beside it",
            f"metrics       {self.workdir / 'metrics.jsonl'}, tensorboard --logdir {self.workdir}",
        ]
        if self.health:
            samples = self.workdir / "health" / "samples.png"
            lines.append(f"health        {samples}, and adapters on the way")
        if self.config.report.enabled:
            lines.append(f"report        {self.workdir / 'report'}: grid.png, summary.json")
        return "\n".join(lines)

    def _header(self, step: int) -> dict[str, str]:
        """What the adapters' file says of itself."""
        return {
            "base": base_name(self.config),
            lora.BASE_HASH: self._model_hash,
            "category": self.config.category,
            "recipe": self.config.recipe,
            "steps": str(step),
        }


def _cache_once_seen(folder: pathlib.Path, key: str) -> data.Cache:
    """The cache that another host has just written; a disk in the network may show it later.

    Raises:
      UserError: it is not there after `SEEN_SECONDS`.
    """
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        try:
            cache = data.Cache(folder)
            if cache.key == key:
                return cache
            raise UserError(
                f"{folder} is another cache here than in the first process: give a --workdir on a "
                "disk that all share"
            )
        except UserError:  # none, or this host still sees what was there
            if time.monotonic() > deadline:
                raise
        time.sleep(1)
