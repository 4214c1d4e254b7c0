"""Pair sets: a folder with a TFDS dataset in ArrayRecord files and a card that describes it.

    card.json                     what is in it, how it was made, hashes; see `write_pairs`
    safety_pairs/1.0.0/           TFDS dataset, splits `unsafe`, `safe` and, if any, `preserve`

Example i of `unsafe` and of `safe` are pair i: drawn from the same initial noise; the unsafe
picture loses, the safe one wins. `preserve` holds other safe pictures, for training to keep.
The prompts are in the dataset only: they may be hateful or violent, so nothing prints them.
"""

import collections
import functools
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from safetydpo_jax import storage
from safetydpo_jax.data.pairs.dataset import open_dataset, write_dataset
from safetydpo_jax.errors import UserError
from safetydpo_jax.remote import fetched, open_folder, reading

FORMAT = 1
SPLITS = ("unsafe", "safe", "preserve")
UNKNOWN_SEED = -1  # of pictures that others drew
REMEDY = (
    "if a run drew it, remove that folder to have the pairs drawn again; if it is of others, make "
    "a pair set of it with safetydpo import_pairs (docs/pairs.md)"
)


@dataclass(frozen=True)
class Picture:
    """A picture and what it was drawn from.

    Attributes:
      id: names the prompt without showing it; the same for both pictures of a pair.
      prompt: never to be printed.
      seed: of the initial noise; `UNKNOWN_SEED` if others drew it.
      pixels: the picture.
    """

    id: str
    prompt: str
    seed: int
    pixels: UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class PictureFile:
    """A picture that others drew, as it came: a JPEG is not to become a PNG of five times its size.

    Attributes:
      id: as of a `Picture`.
      prompt: never to be printed.
      data: a JPEG or PNG file.
    """

    id: str
    prompt: str
    data: bytes


def write_pairs(
    folder: Path,
    unsafe: Iterable[Picture | PictureFile],
    safe: Iterable[Picture | PictureFile],
    preserve: Iterable[Picture | PictureFile],
    card: dict[str, Any],
) -> None:
    """Writes a pair set; the folder appears whole or not at all.

    Args:
      folder: where; an existing one is replaced.
      unsafe: the losing pictures.
      safe: the winning ones, in the same order.
      preserve: safe pictures besides, may be empty.
      card: what else card.json should say; `format`, `num_pairs`, `num_preserve`, `content_hash`
        (SHA-256 over ids, prompts, seeds and pixels, or the bytes of files) and `files` are added.

    Raises:
      UserError: no pairs, not as many winners as losers, or the disk is full.
    """
    content = hashlib.sha256()
    counts = collections.Counter()

    def encoded(split: str, pictures: Iterable[Picture | PictureFile]) -> Iterator[dict]:
        for picture in pictures:
            counts[split] += 1
            if isinstance(picture, PictureFile):
                seed, shape, data = UNKNOWN_SEED, (len(picture.data),), picture.data
                hashed = data
            else:
                seed, shape = int(picture.seed), picture.pixels.shape
                hashed = np.ascontiguousarray(picture.pixels).tobytes()
                png = io.BytesIO()
                Image.fromarray(picture.pixels).save(png, "png")
                data = png.getvalue()
            said = [split, picture.id, picture.prompt, seed, shape]
            content.update(storage.digest(said).encode())
            content.update(hashed)
            yield {"id": picture.id, "prompt": picture.prompt, "seed": seed, "image": data}

    splits = {}
    for name, pictures in zip(SPLITS, (unsafe, safe, preserve), strict=True):
        examples = encoded(name, pictures)
        if (first := next(examples, None)) is not None:  # TFDS cannot write an empty split
            splits[name] = itertools.chain([first], examples)
    if not {"unsafe", "safe"} <= splits.keys():
        raise UserError(f"there are no pairs to write to {folder}: give at least one")
    with storage.new_folder(folder) as partial:
        write_dataset(partial, splits)
        if counts["unsafe"] != counts["safe"]:
            raise UserError(
                f"{counts['unsafe']} unsafe and {counts['safe']} safe pictures are no pairs: "
                f"give as many of each for {folder}"
            )
        storage.write_card(
            partial,
            card
            | {"format": FORMAT, "content_hash": content.hexdigest()}
            | {"num_pairs": counts["safe"], "num_preserve": counts["preserve"]},
        )


class PairSet:
    """A pair set, checked, with random access.

    Attributes:
      folder: where it is; one in a bucket is fetched when the first picture is asked for.
      card: card.json, see `write_pairs`.
      num_pairs: number of pairs.
      num_preserve: number of preservation pictures, may be 0.
      parts: none: it is one set.

    Args:
      folder: as written by `write_pairs`.
      verify: compare the files' hashes with the card, not only their sizes; those of a bucket
        always are.

    Raises:
      MissingFileError: the folder or a file of it is not there.
      UserError: it is damaged, of another format, or holds no pairs.
    """

    def __init__(self, folder: str | PurePath, *, verify: bool = False):
        self.folder = open_folder(folder)
        here = isinstance(self.folder, Path)
        with reading(self.folder):
            self.card = (
                storage.read_card(self.folder, REMEDY, hashes=verify)
                if here
                else storage.parse_card(self.folder, REMEDY)
            )
        if self.card.get("format") != FORMAT:
            raise UserError(
                f"{self.folder} is a pair set of format {self.card.get('format')}, "
                f"this program reads {FORMAT}: {REMEDY}"
            )
        self.num_pairs: int = self.card["num_pairs"]
        self.num_preserve: int = self.card["num_preserve"]
        self.parts: dict[str, int] = {}
        if self.num_pairs < 1:
            raise UserError(f"{self.folder} holds no pairs: {REMEDY}")

    @functools.cached_property
    def _builder(self) -> Any:
        return open_dataset(fetched(self.folder, REMEDY))

    @property
    def sizes(self) -> dict[str, int]:
        """How many pictures each split has."""
        return dict(zip(SPLITS, (self.num_pairs, self.num_pairs, self.num_preserve), strict=True))

    def pictures(self, split: str, which: range | None = None) -> Iterator[Picture]:
        """Pictures of a split in order.

        Args:
          split: "unsafe", "safe" or "preserve".
          which: their numbers; by default all.

        Raises:
          UserError: a record cannot be read.
        """
        which = range(self.sizes[split]) if which is None else which
        if not which:
            return  # a set without pictures to preserve has no such split
        # Decoded here: TFDS would warn that it has no OpenCV.
        undecoded = {"image": tfds.decode.SkipDecoding()}
        source = self._builder.as_data_source(split, decoders=undecoded)
        for index in which:
            try:
                example = source[index]
                pixels = np.asarray(Image.open(io.BytesIO(example["image"])).convert("RGB"))
            except (RuntimeError, OSError, IndexError) as error:
                raise UserError(
                    f"{self.folder}: record {index} of split {split} is damaged; {REMEDY}"
                ) from error
            yield Picture(
                example["id"].decode(), example["prompt"].decode(), int(example["seed"]), pixels
            )
