"""The cache: VAE moments and text embeddings, computed once and read in every epoch.

    card.json                 the key, the counts, the type, sizes and hashes of the files
    pictures.array_record     one record a picture: the unsafe ones of all pairs, the safe ones in
                              the same order, the preservation pictures
    null_embeds.safetensors   {"prompt_embeds": (t, d)} of what guidance steers from

A record is the bytes of a safetensors file: `moments` (orientations, 2, h, w, c), mean and
log-variance of the scaled latents of the picture and, if config.cache.flip, of its mirror image;
and `prompt_embeds` (t, d) of the prompt that the picture was drawn for. SDXL adds to both files
`text_embeds` (p,) and `time_ids` (6,), which stays float32 (`models.conditioning`).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float, UInt8
from PIL import Image

from safetydpo_jax import storage
from safetydpo_jax.data.pairs import PairSet
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.models.pipeline import TOKENIZERS

FORMAT = 1
RECORDS, NULL = "pictures.array_record", "null_embeds.safetensors"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SAFETENSORS_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
IN_MEMORY_BYTES = 2**31  # a smaller cache is read once and held
ENCODE_BATCH = 128  # pictures in memory; the pipeline has batches of its own
REMEDY = "remove that folder to have it computed again"


def make_cache(
    config: Any,
    pipeline: Any,
    workdir: str | Path,
    progress: Callable[[str], None] = print,
) -> "Cache":
    """Opens `workdir`/cache, computing it if it is not there or not of these pairs and this model.

    Args:
      config: `pairs.path` (pairs to use instead of `workdir`/pairs) and `cache`: dtype ("float32",
        "float16" or "bfloat16"), flip (mirror images too) and resolution (pixels along a side of
        what is encoded; 0 is as the model was trained).
      pipeline: whose autoencoder and text encoder to use, a `models.pretrained.Pipeline`.
      workdir: the run's folder.
      progress: is told, in a sentence, what is done.

    Raises:
      UserError: the pairs or the cache are damaged, an unknown dtype, or a full disk.
    """
    if config.cache.dtype not in DTYPES:
        raise UserError(
            f"config.cache.dtype is {config.cache.dtype!r}: it must be one of {', '.join(DTYPES)}"
        )
    side, step = config.cache.resolution or pipeline.resolution, pipeline.vae.config.downscale
    if side < 1 or side % step:
        raise UserError(
            f"config.cache.resolution is {side}: it must be a multiple of {step}, the pixels to a "
            "latent, or 0, as the model was trained"
        )
    pairs = PairSet(config.pairs.path or Path(workdir) / "pairs")
    folder = Path(workdir) / "cache"
    key = _key(config, pipeline, pairs)
    if (folder / storage.CARD).is_file():
        card = storage.read_card(folder, REMEDY)
        if card.get("key") == key:
            return Cache(folder)
        progress("cache: of other pairs, another model or other settings; computed again")
    pairs = PairSet(pairs.folder, verify=True)  # its files are about to be read anyway
    progress(f"cache: encoding {2 * pairs.num_pairs + pairs.num_preserve} pictures")
    dtype = DTYPES[config.cache.dtype]
    with storage.new_folder(folder) as partial:
        null = pipeline.encode_negative([""], size=(side, side))
        null = jax.tree.map(lambda x: x[0], null)
        null = _named(null, np.float32)
        storage.write_file(partial / NULL, safetensors.numpy.save(null))
        writer = ArrayRecordWriter(str(partial / RECORDS), "group_size:1")
        for moments, text in _encoded(pairs, pipeline, side, config.cache.flip):
            record = {"moments": moments.astype(dtype), **_named(text, dtype)}
            writer.write(safetensors.numpy.save(record))
        writer.close()
        storage.write_card(
            partial,
            {
                "format": FORMAT,
                "key": key,
                "num_pairs": pairs.num_pairs,
                "num_preserve": pairs.num_preserve,
                "dtype": config.cache.dtype,
                "flip": config.cache.flip,
            },
        )
    return Cache(folder)


class Cache:
    """A finished cache with random access to its records.

    Attributes:
      folder: where it is.
      key: hash of the pairs, the model's files and the settings it was computed from.
      num_pairs: number of pairs; unsafe pictures are records 0 .. num_pairs - 1, the safe ones
        the next num_pairs.
      num_preserve: number of preservation pictures, the records after those.
      null: what guidance steers away from, float32, without rows: (t, d), ...
      orientations: 2 if there are mirror images, else 1.

    Raises:
      MissingFileError: the folder or a file of it is not there.
      UserError: it is damaged or of another format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        card = storage.read_card(self.folder, REMEDY)
        if card.get("format") != FORMAT:
            raise UserError(
                f"{self.folder} is a cache of format {card.get('format')}, this program reads "
                f"{FORMAT}: {REMEDY}"
            )
        self.key: str = card["key"]
        self.num_pairs: int = card["num_pairs"]
        self.num_preserve: int = card["num_preserve"]
        self.orientations = 2 if card["flip"] else 1
        self.null = Conditioning(**safetensors.numpy.load_file(self.folder / NULL))
        path = self.folder / RECORDS
        self._reader = ArrayRecordReader(str(path))
        count = 2 * self.num_pairs + self.num_preserve
        if self._reader.num_records() != count:
            raise UserError(
                f"{path} is damaged: {self._reader.num_records()} records of {count}; {REMEDY}"
            )
        self._memory = None
        if path.stat().st_size < IN_MEMORY_BYTES:
            self._memory = self._load(np.arange(count))

    def moments(
        self, records: np.ndarray, orientation: np.ndarray
    ) -> dict[str, Float[np.ndarray, "b h w c"]]:
        """{"mean", "logvar"} of the latents of some pictures, float32.

        Args:
          records: (b,) record numbers.
          orientation: (b,) 0 for the picture itself, 1 for its mirror image.
        """
        both = self._take(["moments"], records)["moments"][np.arange(len(records)), orientation]
        return {"mean": both[:, 0].astype(np.float32), "logvar": both[:, 1].astype(np.float32)}

    def conditioning(self, records: np.ndarray) -> Conditioning:
        """What the prompts that some pictures were drawn for tell the UNet, float32."""
        found = self._take(Conditioning._fields, records)
        return Conditioning(**{name: x.astype(np.float32) for name, x in found.items()})

    def _take(self, names: Sequence[str], records: np.ndarray) -> dict[str, np.ndarray]:
        """Those of the named tensors that the cache has."""
        if self._memory is not None:
            return {name: self._memory[name][records] for name in names if name in self._memory}
        found = self._load(records)
        return {name: found[name] for name in names if name in found}

    def _load(self, records: np.ndarray) -> dict[str, np.ndarray]:
        try:
            found = [_tensors(data) for data in self._reader.read(records.tolist())]
        except (RuntimeError, IndexError, safetensors.SafetensorError) as error:
            raise UserError(f"{self.folder / RECORDS} is damaged ({error}); {REMEDY}") from error
        return {name: np.stack([record[name] for record in found]) for name in found[0]}


def _key(config: Any, pipeline: Any, pairs: PairSet) -> str:
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
            **config.cache.to_dict(),
        }
    )


def _encoded(
    pairs: PairSet, pipeline: Any, side: int, flip: bool
) -> Iterator[tuple[Float[np.ndarray, "o 2 h w c"], Conditioning]]:
    """Moments and conditioning of all pictures, in the order of the records."""
    pictures = (p for split in ("unsafe", "safe", "preserve") for p in pairs.pictures(split))
    while batch := list(itertools.islice(pictures, ENCODE_BATCH)):
        pixels = np.stack([square(picture.pixels, side) for picture in batch])
        views = [pixels, pixels[:, :, ::-1]] if flip else [pixels]
        moments = np.stack(
            [np.stack(pipeline.encode_images(view), axis=1) for view in views], axis=1
        )
        texts = pipeline.encode_prompts([picture.prompt for picture in batch], size=(side, side))
        for i, of_picture in enumerate(moments):
            yield of_picture, jax.tree.map(lambda x, i=i: x[i], texts)


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


def _tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a record; safetensors' own NumPy reader knows no bfloat16."""
    return {
        name: np.frombuffer(t["data"], DTYPES[_SAFETENSORS_NAMES[t["dtype"]]]).reshape(t["shape"])
        for name, t in safetensors.deserialize(data)
    }
