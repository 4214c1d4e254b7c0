"""Computing the cache: shard by shard, by one process or several, each shard whole or not there."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, UInt8
from PIL import Image

from safetydpo_jax import storage
from safetydpo_jax.data.cache import DTYPES, FORMAT, NULL, REMEDY, Cache, shard_name
from safetydpo_jax.data.pairs import JoinedPairs, PairSet, Picture, open_pairs
from safetydpo_jax.data.shelf import Shelf
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.models.pipeline import TOKENIZERS, pictures_at_once
from safetydpo_jax.pace import Pace

ENCODE_BATCH = 128  # pictures in memory; the pipeline has batches of its own
MAX_SHARDS = 256  # a reader keeps them all open
# Half precision hardly compresses, and to take it apart again would halve the rate of reading.
RECORDS = "group_size:1,uncompressed"
Pairs = PairSet | JoinedPairs


def make_cache(
    config: Any,
    pipeline: Any,
    workdir: str | Path,
    progress: Callable[[str], None] = print,
    *,
    shelf: str = "",
) -> Cache:
    """Opens `workdir`/cache, computing it if it is not there or not of these pairs and this model.

    Arguments and errors are those of `encode_part`.
    """
    found = encode_part(config, pipeline, workdir, progress, shelf=shelf)
    assert found is not None  # there are no other parts
    return found


def encode_part(
    config: Any,
    pipeline: Any,
    workdir: str | Path,
    progress: Callable[[str], None] = print,
    part: tuple[int, int] = (0, 1),
    *,
    shelf: str = "",
) -> Cache | None:
    """Computes a part of the shards of `workdir`/cache that are not there yet.

    Several processes, on one host or on many that share `workdir`, compute a part each and need
    not know of each other: whichever finds all shards there makes the cache of them. A part that
    was killed goes on at its next shard. Hosts that share a bucket alone bring their shards to a
    shelf there, and whoever is called without a part makes the cache.

    Args:
      config: `pairs.path` (pairs to use instead of `workdir`/pairs) and `cache`: dtype ("float32",
        "float16" or "bfloat16"), flip (mirror images too), resolution (pixels along a side of
        what is encoded; 0 is as the model was trained) and path (a cache to use instead).
      pipeline: whose autoencoder and text encoder to use, a `models.pretrained.Pipeline`.
      workdir: the run's folder.
      progress: is told, in a sentence, what is done, at what rate, and the time left.
      part: (i, n): the i-th of n parts, from 0.
      shelf: an address like gs://bucket/folder where shards are put and looked for, too
        (`data.shelf`). Several parts of one do not look for a cache in their folders, which may
        have another run's past.

    Returns:
      The cache, or None while shards of other parts are missing, and for each of several parts of
      a shelf.

    Raises:
      UserError: the pairs or the cache are damaged, a given cache is of others, an unknown dtype,
        a resolution that makes no latents, a part that cannot be, a full disk, or a shelf that
        cannot be reached.
    """
    _check(config, pipeline, part)
    side = config.cache.resolution or pipeline.resolution
    pairs = open_pairs(config.pairs.path or Path(workdir) / "pairs")
    folder = Path(workdir) / "cache"
    key = cache_key(config, pipeline, pairs)
    if config.cache.path:
        return _given(config.cache.path, key)
    apart = bool(shelf) and part[1] > 1
    shelved = Shelf(shelf, key, None if apart else progress)
    if before := "" if apart else _key_of(folder):
        if before == key:
            return Cache(folder)
        progress("cache: of other pairs, another model or other settings; computed again")
    pairs = open_pairs(pairs.folder, verify=True)  # its files are about to be read anyway
    count = 2 * pairs.num_pairs + pairs.num_preserve
    per_shard = -(-count // (MAX_SHARDS * ENCODE_BATCH)) * ENCODE_BATCH
    num_shards = -(-count // per_shard)
    shards = [shard_name(i, num_shards) for i in range(num_shards)]
    partial = folder.with_name("cache.partial") / key[:16]
    mine = range(part[0], num_shards, part[1])
    try:
        with storage.explained_writes(partial):
            partial.mkdir(parents=True, exist_ok=True)
            there = shelved.names()
            here = {i for i in mine if (partial / shards[i]).exists()}
            for i in here:
                if shards[i] not in there:  # it was killed before that was sent
                    shelved.put(partial / shards[i])
            missing = [i for i in mine if i not in here and shards[i] not in there]
            progress(
                f"cache: encoding {count} pictures in {num_shards} shards"
                + (f", part {part[0]} of {part[1]}: {len(mine)} of them" if part[1] > 1 else "")
                + (f", {len(mine) - len(missing)} there already" if missing != [*mine] else "")
            )
            parts = {i: range(i * per_shard, min((i + 1) * per_shard, count)) for i in missing}
            told = _Told(sum(map(len, parts.values())), side, progress)
            for i, records in parts.items():
                if not apart and _key_of(folder) == key:  # a twin of this part has ended it
                    return Cache(folder)
                encoded = _encoded(pairs, records, pipeline, side, config.cache.flip, told)
                _write_shard(partial / shards[i], encoded, DTYPES[config.cache.dtype])
                shelved.put(partial / shards[i])
            told.end()
            shelved.sent()
            if apart:
                return None
            shelved.take(shards, partial, progress)
            if all((partial / shard).exists() for shard in shards):
                null = pipeline.encode_negative([""], size=(side, side))
                card = {
                    "format": FORMAT,
                    "key": key,
                    "num_pairs": pairs.num_pairs,
                    "num_preserve": pairs.num_preserve,
                    "parts": pairs.parts,
                    "records_per_shard": per_shard,
                    "dtype": config.cache.dtype,
                    "flip": config.cache.flip,
                }
                _finish(partial, folder, shards, jax.tree.map(lambda x: x[0], null), card)
            elif _key_of(folder) != key:  # or another part has just ended it
                progress(f"cache: part {part[0]} is done; {partial} lacks shards of other parts")
                return None
    except UserError:
        if apart or _key_of(folder) != key:  # or a twin of this part took the shards away to end it
            raise
    return Cache(folder)


def is_cached(config: Any, pipeline: Any, workdir: str | Path) -> bool:
    """Whether `workdir`/cache is there, and of these pairs and this model.

    Raises:
      UserError: the pairs are damaged.
    """
    key = cache_key(config, pipeline, open_pairs(config.pairs.path or Path(workdir) / "pairs"))
    return _key_of(Path(workdir) / "cache") == key


def _given(path: str, key: str) -> Cache:
    """A cache made before."""
    cache = Cache(path)
    if cache.key != key:
        raise UserError(
            f"{path} is a cache of other pairs, another model or other settings: leave "
            "config.cache.path empty to have one computed"
        )
    return cache


class _Told:
    """How far it is, and what was made of pictures and prompts that do not fit the model.

    Args:
      count: pictures to encode.
      side: their pixels along a side.
      progress: takes lines of text.
    """

    def __init__(self, count: int, side: int, progress: Callable[[str], None]):
        self._count, self._side, self._progress = count, side, progress
        self._pace, self._done, self._enlarged, self._cut = Pace(count), 0, 0, 0

    def read(self, pictures: Sequence[Picture], cut: int) -> None:
        """These come next; of so many the prompt is cut."""
        sides = [side for x in pictures if (side := min(x.pixels.shape[:2])) < self._side]
        if sides and not self._enlarged:
            self._progress(
                f"cache: pictures are enlarged to {self._side} px, the first of {sides[0]}: what "
                "is learnt is as blurred as they are; were they made for this model?"
            )
        self._enlarged, self._cut = self._enlarged + len(sides), self._cut + cut

    def encoded(self, more: int) -> None:
        """So many more are."""
        self._done += more
        if self._pace.due(self._done):
            self._progress(
                f"cache: {self._done}/{self._count} pictures, {self._pace.rate(self._done):.2f}/s, "
                f"{self._pace.left(self._done):.0f} s left"
            )

    def end(self) -> None:
        """Counts what did not fit."""
        for count, what in (
            (self._enlarged, f"are smaller than {self._side} px and were enlarged"),
            (self._cut, "have a prompt of more tokens than the model reads, which was cut"),
        ):
            if count:
                self._progress(f"cache: {count} of {self._count} pictures {what}")


def check_resolution(config: Any, vae: Any) -> None:
    """Raises UserError if the autoencoder cannot take pictures of the cache's size."""
    side, step = config.cache.resolution, vae.config.downscale
    if side < 0 or side % step:
        raise UserError(
            f"config.cache.resolution is {side}: it must be a multiple of {step}, the pixels to a "
            "latent, or 0, as the model was trained"
        )


def _check(config: Any, pipeline: Any, part: tuple[int, int]) -> None:
    if config.cache.dtype not in DTYPES:
        raise UserError(
            f"config.cache.dtype is {config.cache.dtype!r}: it must be one of {', '.join(DTYPES)}"
        )
    check_resolution(config, pipeline.vae)
    if not 0 <= part[0] < part[1]:
        raise UserError(f"part {part[0]} of {part[1]}: parts are numbered from 0")


def cache_key(config: Any, pipeline: Any, pairs: Pairs) -> str:
    """What the cache depends on; a type is one a network computes in, whatever its file holds."""
    networks = (pipeline.vae_params, pipeline.text_params)
    parts = ("vae", *TOKENIZERS, *TOKENIZERS.values())
    return storage.digest(
        {
            "format": FORMAT,
            "pairs": pairs.card["content_hash"],
            "model": storage.hash_parts(pipeline.sources, parts),
            "zeros_for_empty": pipeline.zeros_for_empty,
            "computed_in": [str(jax.tree.leaves(params)[0].dtype) for params in networks],
            **{k: v for k, v in config.cache.items() if k != "path"},
            "resolution": config.cache.resolution or pipeline.resolution,
        }
    )


def _write_shard(
    file: Path, encoded: Iterator[tuple[np.ndarray, Conditioning]], dtype: Any
) -> None:
    writing = storage.unfinished(file)
    writer = ArrayRecordWriter(str(writing), RECORDS)
    try:
        for moments, text in encoded:
            record = {"moments": moments.astype(dtype), **_named(text, dtype)}
            writer.write(safetensors.numpy.save(record))
        writer.close()
        os.replace(writing, file)
    finally:
        writing.unlink(missing_ok=True)


def _finish(
    partial: Path, folder: Path, shards: list[str], null: Conditioning, card: dict[str, Any]
) -> None:
    """Makes the cache of its shards; several processes may try at once, and any may be killed."""
    old = folder.with_name(f"{folder.name}.old")
    with storage.held(folder.with_name(f".{folder.name}.lock")):
        if _key_of(folder) == card["key"]:
            return  # another was first
        storage.write_file(partial / NULL, safetensors.numpy.save(_named(null, np.float32)))
        storage.write_card(partial, card, [*shards, NULL])
        for file in set(partial.iterdir()) - {partial / x for x in (*shards, NULL, storage.CARD)}:
            file.unlink(missing_ok=True)  # what a killed part was writing
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        partial.parent.rmdir()  # shards of other settings stay


def _key_of(folder: Path) -> str:
    """Of the cache there; "" if there is none."""
    if not (folder / storage.CARD).is_file():
        return ""
    return storage.read_card(folder, REMEDY).get("key", "of no format")


def _encoded(
    pairs: Pairs,
    records: range,
    pipeline: Any,
    side: int,
    flip: bool,
    told: _Told,
) -> Iterator[tuple[Float[np.ndarray, "o 2 h w c"], Conditioning]]:
    """Moments and conditioning of some records, in their order."""
    pictures = _pictures(pairs, records)
    # As many at a time as the devices take: those of a shard can be hours.
    size = min(pictures_at_once(side**2) * pipeline.num_devices, len(records))
    while batch := list(itertools.islice(pictures, ENCODE_BATCH)):
        pixels = np.stack([square(picture.pixels, side) for picture in batch])
        views = [pixels, pixels[:, :, ::-1]] if flip else [pixels]
        prompts = [picture.prompt for picture in batch]
        told.read(batch, pipeline.num_cut(prompts))
        texts = pipeline.encode_prompts(prompts, size=(side, side))
        for start in range(0, len(batch), size):
            # Filled up with the last picture: one shape, one compilation.
            index = np.minimum(np.arange(start, start + size), len(batch) - 1)
            moments = np.stack(
                [np.stack(pipeline.encode_images(view[index]), axis=1) for view in views], axis=1
            )
            stop = min(start + size, len(batch))
            for i in range(start, stop):
                yield moments[i - start], jax.tree.map(lambda x, i=i: x[i], texts)
            told.encoded(stop - start)


def _pictures(pairs: Pairs, records: range) -> Iterator[Picture]:
    """The pictures of some records: the unsafe ones, the safe ones, the preservation pictures."""
    first = 0
    for split, size in pairs.sizes.items():
        start, stop = (min(max(x - first, 0), size) for x in (records.start, records.stop))
        yield from pairs.pictures(split, range(start, stop))
        first += size


def square(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """The picture's middle: its shorter side made `side` pixels long, the longer one cut.

    As in SafetyDPO's training (arXiv 2412.10493), with a triangle filter.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _named(text: Conditioning, dtype: Any) -> dict[str, np.ndarray]:
    """The fields that are there; sizes in pixels are more than half precision can count."""
    fields = {name: x for name, x in text._asdict().items() if x is not None}
    return {
        name: np.asarray(x, np.float32 if name == "time_ids" else dtype)
        for name, x in fields.items()
    }
