"""The TFDS builder of pair sets: ArrayRecord on disk, no TensorFlow to write or read it."""

import io
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow_datasets as tfds


class SafetyPairs(tfds.core.GeneratorBasedBuilder):
    """Pictures drawn by a model, one example a picture, given ready and encoded.

    Args:
      examples: by split, the examples in order: dicts of `features`, the image as bytes of PNG or
        JPEG.
      **kwargs: of TFDS's builders.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, examples: Mapping[str, Iterable[dict]], **kwargs):
        self._examples = examples
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
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

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {
            split: self._generate_examples(examples) for split, examples in self._examples.items()
        }

    def _generate_examples(self, examples):
        for index, example in enumerate(examples):
            yield index, example | {"image": io.BytesIO(example["image"])}
