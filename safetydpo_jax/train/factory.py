"""The factory: from a list of unsafe concepts to a pair set and its cache for every category.

WORKDIR/prompts/hate/prompts.csv ...   what a language model wrote, if one did
WORKDIR/pairs/hate ...                 pair sets, README.md about them, pairs.png
WORKDIR/hate/cache ...                 what training reads, where configs/all_experts.py looks
"""

import pathlib
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from safetydpo_jax import __version__, data, storage
from safetydpo_jax.data.draw import draw_all
from safetydpo_jax.data.pair_card import README, write_pair_card
from safetydpo_jax.data.pairs.picture import write_picture
from safetydpo_jax.data.pending import PendingPairs
from safetydpo_jax.data.writing.sources import Writer
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.models.checkpoint import open_checkpoint
from safetydpo_jax.train.base import check_drawable, check_sampler, load_on_all_devices
from safetydpo_jax.train.model_card import base_name
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.workdir import Phases, lock_workdir


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[str], None] = lambda line: print(line, flush=True),
    options: str = "",
) -> pathlib.Path:
    """Writes prompts, draws and encodes the pairs, or goes on where an earlier call ended.

    Args:
      config: as `configs/coprov2.py` makes it.
      workdir: the folder, which all parts share.
      part: (i, n): this process is the i-th of n; they end with what one would have made.
      progress: takes lines of text; never a prompt.
      options: those of the command line that training wants, too.

    Returns:
      The folder of the pair sets, `workdir`/pairs.

    Raises:
      UserError: a wrong config or list of concepts, or what the stages raise.
    """
    phases, workdir = Phases(progress, total=5), pathlib.Path(workdir)

    phases.begin("config and workdir")
    check_nothing_given(config)
    writer = Writer(config, workdir / "prompts")
    shares = _shares(config.pairs.num_pairs, writer.categories)
    configs = {name: _config_of(config, name, count) for name, count in shares.items()}
    # Now, before anybody is paid for prompts.
    base = open_checkpoint(config.model, vae=config.vae, configs=config.model_config)
    check_sampler(config, base.schedule)
    data.check_resolution(config, base.networks["vae"])
    with lock_workdir(workdir, part):
        progress(f"{', '.join(shares)}, {workdir}, part {part[0]} of {part[1]}")
        progress(f"{config.pairs.num_pairs} pairs, prompts by {writer.name}")

        phases.begin("prompts")
        sources = writer.write(shares, progress)
        configs = {name: configs[name] for name in sources}
        for name, (harm, _) in sources.items():
            configs[name].harm = harm

        phases.begin("base model")
        pipeline = load_on_all_devices(config, progress)
        check_drawable(config, pipeline)

        phases.begin("pairs")
        folder = workdir / "pairs"
        sets = [
            PendingPairs(configs[name], pipeline, folder / name, source)
            for name, (_, source) in sources.items()
        ]
        draw_all(sets, pipeline, progress, part)
        for pairs in sets:
            pairs.finish(progress)

        phases.begin("cache")
        keys = {}
        # Again and quietly, for what other parts have ended meanwhile.
        for tell in (progress, lambda line: None):
            for name, one in configs.items():
                one.pairs.path = str(folder / name)
                say = lambda line, name=name, tell=tell: tell(f"{name}: {line}")  # noqa: E731
                if name not in keys and (
                    cache := data.encode_part(one, pipeline, workdir / name, say, part)
                ):
                    keys[name] = cache.key
        phases.end()
    progress(phases.table())
    if len(keys) < len(configs):
        progress("this part is done; other parts still encode, and the last of them ends the job")
        return folder
    written = {name: data.PairSet(folder / name) for name in configs}
    with storage.explained_writes(folder):
        write_pair_card(
            folder,
            written,
            model=base_name(config),
            license=config.license,
            writer=writer.about(),
            caches=keys,
            version=__version__,
        )
        write_picture(
            folder / "pairs.png",
            written,
            title="Pairs as drawn",
            judged=config.base == "emoji",
            reveal=config.report.reveal,
            revealed_by="config.report.reveal=true",
        )
    counts = [(pairs.num_pairs, pairs.num_preserve) for pairs in written.values()]
    num_pairs, num_others = (sum(column) for column in zip(*counts, strict=True))
    progress(
        f"pairs         {folder}: {num_pairs} of {config.pairs.num_pairs} pairs, {num_others} "
        f"preservation pictures; {README}, pairs.png\n"
        f"caches        {workdir}: CATEGORY/cache"
    )
    for command in _to_train(config, workdir, configs, options):
        progress(f"to train      {command}")
    return folder


def check_nothing_given(config: ConfigDict) -> None:
    """Raises UserError if the config names pairs or a cache made before."""
    for name in ("pairs", "cache"):
        if path := config[name].path:
            raise UserError(f"config.{name}.path is {path}: with {name} there is nothing to make")


def _shares(count: int, categories: list[str]) -> dict[str, int]:
    """As many pairs of each category as of any other, but for one."""
    if count < len(categories):
        raise UserError(
            f"config.pairs.num_pairs is {count}: it must be {len(categories)} or more, one for "
            "each category"
        )
    ends = [count * i // len(categories) for i in range(len(categories) + 1)]
    return {
        name: end - start for name, start, end in zip(categories, ends[:-1], ends[1:], strict=True)
    }


def _config_of(config: ConfigDict, name: str, num_pairs: int) -> ConfigDict:
    """The config of a category's expert, as far as pairs and cache go."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        del one.writer
    one.category, one.pairs.num_pairs = name, num_pairs
    return resolve(one, pairs_only=True)


def _to_train(
    config: ConfigDict, workdir: pathlib.Path, configs: dict[str, ConfigDict], options: str
) -> Iterator[str]:
    """The commands that train what the factory made pairs for: one for the seven, or one each."""
    base = ("" if config.base == "emoji" else f":{config.base}") + f" {options}".rstrip()
    pairs = workdir / "pairs"
    if configs.keys() == set(CATEGORIES):
        yield (
            f"safetydpo train --config all_experts{base} --config.pairs.path={pairs} "
            f"--workdir {workdir}"
        )
        return
    for name, one in configs.items():
        of = name if name in CATEGORIES else "own"
        harm = f" --config.harm={one.harm}" if one.harm else ""
        yield (
            f"safetydpo train --config {of}{base}{harm} --config.pairs.path={pairs / name} "
            f"--workdir {workdir / name}"
        )
