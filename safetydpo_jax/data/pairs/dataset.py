"""Pair sets as TFDS datasets: ArrayRecord on disk, no TensorFlow to write or read it."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from safetydpo_jax.errors import UserError, first_line

_FEATURES = "tensorflow_datasets.core.features."
_NAMING = {"pythonClassName", "python_class_name", "type"}  # the keys by which TFDS finds a class
NAME, VERSION = "safety_pairs", "1.0.0"
PICTURES = 1024  # of a file, at the most
AT_ONCE = 64  # pictures in memory; after each lot TFDS writes its metadata


def write_dataset(folder: Path, splits: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """Writes a dataset to `folder`, picture by picture.

    A builder of TFDS's would hold a split in memory, and import TensorFlow for more than 1000 MB.

    Args:
      folder: where; the dataset is in a folder of its name and version within.
      splits: their examples in order: dicts of id, prompt, seed, and the image as bytes of PNG or
        JPEG.
    """
    place = folder / NAME / VERSION
    place.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(NAME, tfds.core.Version(VERSION), str(place), module_name=__name__),
        description="Picture i of `unsafe` (loser) and of `safe` (winner) are one pair.",
        features=tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(doc="of the prompt; the same for both of a pair"),
                "prompt": tfds.features.Text(doc="what the picture was drawn for"),
                "seed": tfds.features.Scalar(np.int64, doc="of the initial noise"),
                "image": tfds.features.Image(shape=(None, None, 3)),
            }
        ),
        disable_shuffling=True,
    )
    writer = tfds.core.SequentialWriter(info, PICTURES, file_format="array_record")
    writer.initialize_splits(list(splits))
    for name, examples in splits.items():
        readable = (example | {"image": io.BytesIO(example["image"])} for example in examples)
        while some := list(itertools.islice(readable, AT_ONCE)):
            writer.add_examples({name: some})
    writer.close_all()


def open_dataset(folder: Path) -> Any:
    """The dataset of a folder, a TFDS builder for reading.

    Raises:
      UserError: its features are not those of a pair set.
    """
    place = folder / NAME / VERSION
    _check_features(place / "features.json")
    return tfds.builder_from_directory(place)


def _check_features(file: Path) -> None:
    """TFDS imports whatever module a dataset's features name, which may come from anywhere."""

    def named(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (str(value[key]) for key in _NAMING & value.keys())
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                yield from named(part)

    try:
        names = set(named(json.loads(file.read_text())))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is missing or damaged ({first_line(error)})") from None
    if others := sorted(name for name in names if not name.startswith(_FEATURES)):
        raise UserError(f"{file} asks for {others[0]}: that is no pair set of this program")
