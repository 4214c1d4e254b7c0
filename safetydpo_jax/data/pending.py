"""A pair set on its way: which batches of pictures it still takes, and what becomes of them."""

import collections
import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from safetydpo_jax import storage
from safetydpo_jax.data.chunks import Chunks
from safetydpo_jax.data.pairs import PairSet, Picture, write_pairs
from safetydpo_jax.data.sources import PairSource
from safetydpo_jax.errors import UserError

PAIR_SEEDS, PRESERVE_SEEDS = 0, 1  # streams of noise seeds
OVERDRAW = 2  # how many pairs are drawn at most for every one wanted


class Chunk(NamedTuple):
    """A batch of one set.

    Attributes:
      name: of its file.
      number: in the set.
      texts: the prompts, a batch of them; the last may be there several times.
      seeds: of their noise.
    """

    name: str
    number: int
    texts: list[str]
    seeds: np.ndarray


class State(NamedTuple):
    """How far a set is, in pairs and in preservation pictures."""

    drawn: int
    kept: int
    wanted: int
    others: int
    others_wanted: int

    @property
    def pictures(self) -> int:
        return 2 * self.drawn + self.others


class PendingPairs:
    """The pair set of a category on its way: what is drawn of it, and what is still to be.

    Attributes:
      folder: of the set.
      category: whose pairs they are.
      options: of `samplers.draw_pictures`.

    Args:
      config: `category`, `harm`, `base`, `model`, `dtype`; `pairs`: num_pairs, preserve_count,
        seed; `drawing`: batch_size (of pictures, on each device) and the other options of
        `samplers.draw_pictures`.
      pipeline: the base model, a `models.pretrained.Pipeline`.
      folder: for the set; chunks are kept beside it until it is whole.
      source: prompts and judge.

    Raises:
      UserError: a value of the config that cannot be, or a pair set drawn with other settings.
    """

    def __init__(self, config: Any, pipeline: Any, folder: Path, source: PairSource):
        check_options(config)
        self.folder, self.category = folder, config.category
        self._model, self._source = str(config.model), source
        self._wanted, seed = config.pairs.num_pairs, config.pairs.seed
        self._half = max(1, config.drawing.batch_size // 2)  # an unsafe and a safe picture each
        self._size = 2 * self._half
        # The same on one device and on several, whose chunks are drawn at once.
        self.options = config.drawing.to_dict()
        self.options["batch_size"] = min(config.drawing.batch_size, self._size)
        count = -(-OVERDRAW * self._wanted // self._half) * self._half
        self._pairs = source.pairs(count, seed)
        self._others = source.preserve(config.pairs.preserve_count, seed)
        self._seeds = noise_seeds(seed, PAIR_SEEDS, count)
        self._other_seeds = noise_seeds(seed, PRESERVE_SEEDS, len(self._others))
        self._settings = _settings(config, pipeline, source, self._pairs, self._others)
        key = storage.digest({"chunks": 2, **self._settings})[:16]
        with self._held():
            if self.finished:
                self._check_same()
                self._clear()  # if it was killed before it did
            else:
                self._chunks = Chunks(self._drawing / key)

    @property
    def finished(self) -> bool:
        """Whether the set is there."""
        return self.folder.exists()

    @property
    def leftovers(self) -> list[Path]:
        """Folders of chunks that were drawn with other settings; they go when the set is done."""
        if not self.finished:
            with self._unless_finished():
                return [f for f in self._drawing.iterdir() if f != self._chunks.folder]
        return []

    def missing(self) -> list[Chunk]:
        """The chunks that are not there and are needed, even if all pairs before should be good.

        Raises:
          UserError: all that may be drawn is, and no pair is good.
        """
        if not self.finished:
            with self._unless_finished():
                return self._missing(self._chunks.names())
        return []

    def _missing(self, names: set[str]) -> list[Chunk]:
        found, good = [], 0
        starts = range(0, len(self._pairs), self._half)
        for number, start in enumerate(starts):
            if good >= self._wanted:
                break
            if (name := f"pairs-{start:06d}") in names:
                good += self._verdicts_of(name).count("")
            else:
                pairs = self._pairs[start : start + self._half]
                texts = [unsafe.text for unsafe, _ in pairs] + [safe.text for _, safe in pairs]
                noise = np.tile(self._seeds[start : start + self._half], 2)
                found.append(Chunk(name, number, texts, noise))
                good += self._half
        if not good:
            raise self._none_passed()
        for number, start in enumerate(range(0, len(self._others), self._size), len(starts)):
            if (name := f"preserve-{start:06d}") not in names:
                # Filled up with its last picture: all chunks are batches of one shape.
                last = len(self._others) - 1
                chosen = np.minimum(np.arange(start, start + self._size), last)
                texts = [self._others[i].text for i in chosen]
                found.append(Chunk(name, number, texts, self._other_seeds[chosen]))
        return found

    def keep(self, chunk: Chunk, pictures: UInt8[np.ndarray, "n H W 3"]) -> None:
        """Judges a chunk's pictures and stores both."""
        verdicts = []
        if chunk.number * self._half < len(self._pairs):
            start = chunk.number * self._half
            pairs = self._pairs[start : start + self._half]
            unsafe, safe = np.split(pictures, 2)
            verdicts = self._source.judge(unsafe, safe, pairs)
        with self._unless_finished():
            self._chunks.write(chunk.name, pictures, verdicts)

    def state(self) -> State:
        """How far it is."""
        if not self.finished:
            with self._unless_finished():
                names = self._chunks.names()
                verdicts, count = self._verdicts(names), len(self._others)
                others = min(count, self._size * sum(name.startswith("preserve") for name in names))
                kept = min(verdicts.count(""), self._wanted)
                return State(len(verdicts), kept, self._wanted, others, count)
        return State(0, 0, 0, 0, 0)

    def finish(self, progress: Callable[[str], None] = print) -> Path:
        """Writes the set of its chunks, unless it is there, and removes them; its folder.

        Raises:
          UserError: the disk is full.
        """
        with self._held():
            if self.finished:
                self._check_same()
                progress(f"pairs: {PairSet(self.folder).num_pairs} found in {self.folder}")
            elif self._missing(self._chunks.names()):
                raise UserError(
                    f"{self._chunks.folder} lacks pictures that were there: the same command "
                    "draws them again"
                )
            else:
                self._write(progress)
            self._clear()
        return self.folder

    @property
    def _drawing(self) -> Path:
        """Where the chunks are, in a folder for these settings."""
        return self.folder.with_name(f"{self.folder.name}.drawing")

    def _held(self) -> contextlib.AbstractContextManager[None]:
        """Within, no other process makes or ends the set."""
        return storage.held(self.folder.with_name(f".{self.folder.name}.lock"))

    def _clear(self) -> None:
        """Removes chunks that nobody needs any more; one may just be written in vain."""
        shutil.rmtree(self._drawing, ignore_errors=True)

    def _check_same(self) -> None:
        """Raises UserError if the set there was drawn with other settings."""
        remedy = (
            "remove that folder, choose another --workdir, or give it to training as it is, as "
            "config.pairs.path"
        )
        found = PairSet(self.folder).card.get("settings", {})
        storage.check_same(self.folder, found, self._settings, remedy)

    @contextlib.contextmanager
    def _unless_finished(self) -> Iterator[None]:
        """Forgives within that chunks are gone, if another process has made the set of them."""
        try:
            yield
        except (FileNotFoundError, UserError):
            if not self.finished:
                raise

    def _write(self, progress: Callable[[str], None]) -> None:
        verdicts = self._verdicts(self._chunks.names())
        kept = [i for i, verdict in enumerate(verdicts) if not verdict][: self._wanted]
        dropped = collections.Counter(filter(None, verdicts))
        if len(kept) < self._wanted:
            progress(
                f"pairs: only {len(kept)} of {self._wanted} wanted pairs of {self.category}; "
                f"{_said(dropped)}"
            )

        def side(which: int) -> Iterator[Picture]:
            for i in kept:
                prompt = self._pairs[i][which]
                chunk = self._chunks.pictures(f"pairs-{i // self._half * self._half:06d}")
                pixels = chunk[which * self._half + i % self._half]
                yield Picture(prompt.id, prompt.text, int(self._seeds[i]), pixels)

        def others() -> Iterator[Picture]:
            for i, prompt in enumerate(self._others):
                chunk = self._chunks.pictures(f"preserve-{i // self._size * self._size:06d}")
                seed = int(self._other_seeds[i])
                yield Picture(prompt.id, prompt.text, seed, chunk[i % self._size])

        counts = {
            "drawn": len(verdicts),
            "kept": len(kept),
            "dropped": dict(dropped),
            "not_needed": len(verdicts) - len(kept) - dropped.total(),
        }
        card = {"model": self._model, "settings": self._settings, "counts": counts}
        write_pairs(self.folder, side(0), side(1), others(), card)

    def _verdicts(self, names: set[str]) -> list[str]:
        """On the pairs from the first on, as far as is drawn and needed."""
        verdicts: list[str] = []
        while len(verdicts) < len(self._pairs) and verdicts.count("") < self._wanted:
            if (name := f"pairs-{len(verdicts):06d}") not in names:
                break
            verdicts += self._verdicts_of(name)
        return verdicts

    def _verdicts_of(self, name: str) -> list[str]:
        verdicts = self._chunks.verdicts(name)
        if len(verdicts) != self._half:
            raise UserError(f"{self._chunks.folder}, {name} is damaged: remove it to draw it again")
        return verdicts

    def _none_passed(self) -> UserError:
        verdicts = self._verdicts(self._chunks.names())
        return UserError(
            f"none of the {len(verdicts)} pairs that {self._model} drew for {self.category} "
            f"passed the judge ({_said(collections.Counter(verdicts))}): the model may not know "
            "these concepts; look at config.drawing, or take pairs made otherwise (docs/pairs.md)"
        )


def noise_seeds(seed: int, stream: int, count: int) -> np.ndarray:
    """Seeds of initial noise, uint32 (count,); a longer list begins with the shorter one."""
    return np.random.SeedSequence((seed, stream)).generate_state(count)


def check_options(config: Any) -> None:
    """Raises UserError for a number in `config.pairs` or `config.drawing` that cannot be."""
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


def _said(dropped: collections.Counter) -> str:
    return (
        ", ".join(f"{count} x {reason}" for reason, count in sorted(dropped.items())) or "0 dropped"
    )
