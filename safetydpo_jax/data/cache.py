"""The cache: VAE moments and text embeddings, computed once (`encode`) and read in every epoch.

    card.json                             the key, the counts, the type, the files' sizes and hashes
    pictures-00000-of-00006.array_record  one record a picture: the unsafe ones of all pairs, the
                                          safe ones in the same order, the preservation pictures
    null_embeds.safetensors               {"prompt_embeds": (t, d)} of what guidance steers from

A record is the bytes of a safetensors file: `moments` (orientations, 2, h, w, c), mean and
log-variance of the scaled latents of the picture and, if config.cache.flip, of its mirror image;
and `prompt_embeds` (t, d) of the prompt that the picture was drawn for. SDXL adds to both files
`text_embeds` (p,) and `time_ids` (6,), which stays float32 (`models.conditioning`).
"""

from collections.abc import Sequence
from pathlib import PurePath

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int, Shaped

from safetydpo_jax import storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.remote import fetched, open_folder

FORMAT = 2
NULL = "null_embeds.safetensors"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SAFETENSORS_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
IN_MEMORY_BYTES = 2**31  # a smaller cache is read once and held
REMEDY = (
    "if it is the run's own, remove that folder to have it computed again; if config.cache.path "
    "names it, leave that empty"
)

Moments = dict[str, Shaped[np.ndarray, "b h w c"]]  # NumPy's bfloat16 is none of its own floats


def shard_name(index: int, count: int) -> str:
    """The file of a shard."""
    return f"pictures-{index:05d}-of-{count:05d}.array_record"


class Cache:
    """A finished cache with random access to its records.

    Attributes:
      folder: where it is, or its copy on this host if it is in a bucket.
      key: hash of the pairs, the model's files and the settings it was computed from.
      num_pairs: number of pairs; unsafe pictures are records 0 .. num_pairs - 1, the safe ones
        the next num_pairs.
      num_preserve: number of preservation pictures, the records after those.
      parts: of joined pair sets, how many pairs come from each, in order; else empty.
      null: what guidance steers away from, float32, without rows: (t, d), ...
      orientations: 2 if there are mirror images, else 1.

    Raises:
      MissingFileError: the folder or a file of it is not there.
      UserError: it is damaged or of another format.
    """

    def __init__(self, folder: str | PurePath):
        self.folder = fetched(open_folder(folder), REMEDY)
        card = storage.read_card(self.folder, REMEDY)
        if card.get("format") != FORMAT:
            raise UserError(
                f"{self.folder} is a cache of format {card.get('format')}, this program reads "
                f"{FORMAT}: {REMEDY}"
            )
        self.key: str = card["key"]
        self.num_pairs: int = card["num_pairs"]
        self.num_preserve: int = card["num_preserve"]
        self.parts: dict[str, int] = card["parts"]
        self.orientations = 2 if card["flip"] else 1
        self.null = Conditioning(**safetensors.numpy.load_file(self.folder / NULL))
        self._per_shard: int = card["records_per_shard"]
        count = 2 * self.num_pairs + self.num_preserve
        num_shards = -(-count // self._per_shard)
        paths = [self.folder / shard_name(i, num_shards) for i in range(num_shards)]
        # Records are read one here, one there: reading ahead would be in vain.
        self._readers = [ArrayRecordReader(str(p), "readahead_buffer_size:0") for p in paths]
        found = sum(reader.num_records() for reader in self._readers)
        if found != count:
            raise UserError(f"{self.folder} is damaged: {found} records of {count}; {REMEDY}")
        self._memory = None
        if sum(path.stat().st_size for path in paths) < IN_MEMORY_BYTES:
            rows = self._load(np.arange(count))
            self._memory = {name: _stacked(rows, name) for name in rows[0]}

    def read(
        self, records: Int[np.ndarray, "b"], orientation: Int[np.ndarray, "b"] | None = None
    ) -> tuple[Moments, Conditioning]:
        """What some pictures and their prompts are to the model, in the type that is stored.

        Args:
          records: their numbers.
          orientation: 0 for a picture itself, 1 for its mirror image; by default all 0.

        Returns:
          {"mean", "logvar"} of the pictures' latents, and what the prompts that they were drawn for
          tell the UNet.
        """
        orientation = np.zeros_like(records) if orientation is None else orientation
        if self._memory is not None:
            both = self._memory["moments"][records, orientation]
            told = {k: self._memory[k][records] for k in Conditioning._fields if k in self._memory}
        else:
            unique, back = np.unique(records, return_inverse=True)
            found = self._load(unique)
            rows = [found[i] for i in back]
            both = np.stack([row["moments"][o] for row, o in zip(rows, orientation, strict=True)])
            told = {k: _stacked(rows, k) for k in Conditioning._fields if k in rows[0]}
        return {"mean": both[:, 0], "logvar": both[:, 1]}, Conditioning(**told)

    def _load(self, records: Int[np.ndarray, "b"]) -> list[dict[str, np.ndarray]]:
        """The tensors of records, whose numbers rise."""
        shards = records // self._per_shard
        try:
            return [
                _tensors(data)
                for shard in np.unique(shards)
                for data in self._readers[shard].read(
                    (records[shards == shard] % self._per_shard).tolist()
                )
            ]
        except (RuntimeError, IndexError, safetensors.SafetensorError) as error:
            raise UserError(f"{self.folder} is damaged ({error}); {REMEDY}") from error


def _stacked(rows: Sequence[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.stack([row[name] for row in rows])


def _tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a record; safetensors' own NumPy reader knows no bfloat16."""
    return {
        name: np.frombuffer(t["data"], DTYPES[_SAFETENSORS_NAMES[t["dtype"]]]).reshape(t["shape"])
        for name, t in safetensors.deserialize(data)
    }
