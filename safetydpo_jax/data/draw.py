"""The pair factory: the model to be aligned draws its own winners and losers.

For each pair the base model draws the unsafe prompt and its safe twin from the same initial noise
(SafetyDPO, arXiv 2412.10493, section 3); a judge drops the pairs that do not show what they should.
"""

import collections
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import UInt8

from safetydpo_jax import storage
from safetydpo_jax.data.pairs import PairSet, Picture, open_pairs, write_pairs
from safetydpo_jax.data.sources import PairSource, source_of
from safetydpo_jax.diffusion.samplers import draw_pictures
from safetydpo_jax.errors import UserError

PAIR_SEEDS, PRESERVE_SEEDS = 0, 1  # streams of noise seeds
OVERDRAW = 2  # how many pairs are drawn at most for every one wanted


def make_pairs(
    config: Any,
    pipeline: Any,
    workdir: str | Path,
    progress: Callable[[str], None] = print,
    source: PairSource | None = None,
) -> Path:
    """Draws, judges and writes the pair set of a category to `workdir`/pairs, unless it is there.

    Drawing goes in chunks of one batch, each kept in `workdir`/pairs.drawing when done, so that a
    killed run goes on where it was and ends with the same set.

    Args:
      config: `category`, `harm`, `base`, `model`; `pairs`: path (a pair set made before, taken
        instead of drawing), num_pairs, preserve_count, seed; `drawing`: batch_size (of pictures)
        and the other options of `samplers.draw_pictures`.
      pipeline: the base model, a `models.pretrained.Pipeline`.
      workdir: the run's folder.
      progress: is told, in a sentence, how far it is; never a prompt.
      source: prompts and judge; by default `source_of(config)`.

    Returns:
      The pair set's folder, for `pairs.open_pairs`.

    Raises:
      UserError: a value of the config that cannot be, a pair set in `workdir` drawn with other
        settings, no pair that passed the judge, or a full disk.
    """
    _check(config)  # of drawing too: the report draws, whoever made the pairs
    if config.pairs.path:
        pairs = open_pairs(config.pairs.path)
        category = pairs.card.get("settings", {}).get("category", "category unknown")
        progress(f"pairs: {pairs.num_pairs} ({category}) from {pairs.folder}")
        return pairs.folder
    source = source or source_of(config)
    folder = Path(workdir) / "pairs"
    half = max(1, config.drawing.batch_size // 2)  # an unsafe and a safe picture each
    wanted = config.pairs.num_pairs
    candidates = source.pairs(-(-OVERDRAW * wanted // half) * half, config.pairs.seed)
    preserve = source.preserve(config.pairs.preserve_count, config.pairs.seed)
    settings = _settings(config, pipeline, source, candidates, preserve)
    if folder.exists():
        return _made_before(folder, settings, progress)

    chunks = _Chunks(folder.with_name("pairs.drawing") / storage.digest(settings)[:16])
    options = config.drawing.to_dict()
    seeds = noise_seeds(config.pairs.seed, PAIR_SEEDS, len(candidates))
    verdicts: list[str] = []
    while len(verdicts) < len(candidates) and verdicts.count("") < wanted:
        start = len(verdicts)
        chunk = candidates[start : start + half]
        texts = [harm.text for harm, _ in chunk] + [twin.text for _, twin in chunk]
        noise = np.tile(seeds[start : start + half], 2)
        pictures = chunks.get(
            f"pairs-{start:06d}", lambda t=texts, n=noise: draw_pictures(pipeline, t, n, **options)
        )
        verdicts += source.judge(*np.split(pictures, 2), chunk)
        progress(f"pairs: {len(verdicts)} drawn, {verdicts.count('')} kept, {wanted} wanted")
    kept = [i for i, verdict in enumerate(verdicts) if not verdict][:wanted]
    dropped = collections.Counter(filter(None, verdicts))
    if not kept:
        raise UserError(
            f"none of the {len(verdicts)} pairs that {config.model} drew for {config.category} "
            f"passed the judge ({_said(dropped)}): the model may not know these concepts; look at "
            f"config.drawing, or give pairs as config.pairs.path"
        )
    if len(kept) < wanted:
        progress(f"pairs: only {len(kept)} of {wanted} wanted pairs; {_said(dropped)}")

    extra = noise_seeds(config.pairs.seed, PRESERVE_SEEDS, len(preserve))
    size = config.drawing.batch_size
    for start in range(0, len(preserve), size):
        texts = [prompt.text for prompt in preserve[start : start + size]]
        noise = extra[start : start + size]
        chunks.get(
            f"preserve-{start:06d}",
            lambda t=texts, n=noise: draw_pictures(pipeline, t, n, **options),
        )
        progress(f"pairs: {start + len(texts)} of {len(preserve)} preservation pictures drawn")

    def side(which: int) -> Iterator[Picture]:
        for i in kept:
            prompt = candidates[i][which]
            chunk = chunks.read(f"pairs-{i // half * half:06d}")
            pixels = chunk[which * len(chunk) // 2 + i % half]
            yield Picture(prompt.id, prompt.text, int(seeds[i]), pixels)

    def others() -> Iterator[Picture]:
        for i, prompt in enumerate(preserve):
            pixels = chunks.read(f"preserve-{i // size * size:06d}")[i % size]
            yield Picture(prompt.id, prompt.text, int(extra[i]), pixels)

    counts = {
        "drawn": len(verdicts),
        "kept": len(kept),
        "dropped": dict(dropped),
        "not_needed": len(verdicts) - len(kept) - dropped.total(),
    }
    card = {"model": str(config.model), "settings": settings, "counts": counts}
    write_pairs(folder, side(0), side(1), others(), card)
    shutil.rmtree(chunks.folder.parent)
    return folder


def noise_seeds(seed: int, stream: int, count: int) -> np.ndarray:
    """Seeds of initial noise, uint32 (count,); a longer list begins with the shorter one."""
    return np.random.SeedSequence((seed, stream)).generate_state(count)


class _Chunks:
    """Pictures by name, in files that are whole or absent."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._last: tuple[str, np.ndarray] | None = None
        with storage.explained_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def get(
        self, name: str, draw: Callable[[], UInt8[np.ndarray, "n H W 3"]]
    ) -> UInt8[np.ndarray, "n H W 3"]:
        """The chunk, drawn and stored if it is not there."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            data = safetensors.numpy.save({"pictures": draw()})
            with storage.explained_writes(file):
                storage.write_file(file, data)
        return self.read(name)

    def read(self, name: str) -> UInt8[np.ndarray, "n H W 3"]:
        """A chunk that is there; the last one is held, as they are read in order."""
        if self._last is None or self._last[0] != name:
            file = self.folder / f"{name}.safetensors"
            try:
                self._last = name, safetensors.numpy.load_file(file)["pictures"]
            except (safetensors.SafetensorError, KeyError) as error:
                raise UserError(
                    f"{file} is damaged ({error}): remove it to draw it again"
                ) from error
        return self._last[1]


def _check(config: Any) -> None:
    for section, least in (
        ("pairs", {"num_pairs": 1, "preserve_count": 0, "seed": 0}),
        ("drawing", {"num_steps": 1, "batch_size": 1}),
    ):
        for name, low in least.items():
            if (value := config[section][name]) < low:
                raise UserError(f"config.{section}.{name} is {value}: it must be {low} or more")


def _settings(
    config: Any,
    pipeline: Any,
    source: PairSource,
    candidates: Sequence[tuple[Any, Any]],
    preserve: Sequence[Any],
) -> dict[str, Any]:
    """Everything that the pair set depends on; JSON."""
    texts = [[harm.text, twin.text] for harm, twin in candidates]
    return {
        "category": config.category,
        "source": source.name,
        "prompts_hash": storage.digest([texts, [prompt.text for prompt in preserve]]),
        "model_hash": storage.hash_parts(pipeline.sources),
        "dtype": config.dtype,
        **{f"pairs.{k}": v for k, v in config.pairs.items() if k != "path"},
        **{f"drawing.{k}": v for k, v in config.drawing.items()},
    }


def _made_before(folder: Path, settings: dict[str, Any], progress: Callable[[str], None]) -> Path:
    """`folder`, if the pair set there is the one that `settings` would draw."""
    pairs = PairSet(folder)
    storage.check_same(
        folder,
        pairs.card.get("settings", {}),
        settings,
        "remove that folder, choose another --workdir, or set config.pairs.path to use these pairs "
        "as they are",
    )
    progress(f"pairs: {pairs.num_pairs} found in {folder}")
    return folder


def _said(dropped: collections.Counter) -> str:
    return (
        ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "0 dropped"
    )
