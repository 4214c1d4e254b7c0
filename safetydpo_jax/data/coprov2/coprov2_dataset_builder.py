"""The TFDS builder of CoProV2 (SafetyDPO, arXiv 2412.10493): ArrayRecord files, no TensorFlow.

Training here takes pair sets, which `launch/import_pairs.py` makes of the same files; this is for
whoever reads TFDS datasets.
"""

import collections
import functools
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds

from safetydpo_jax.data.import_pairs import is_held_out
from safetydpo_jax.data.inputs.check import usable
from safetydpo_jax.data.inputs.coprov2 import read_coprov2
from safetydpo_jax.data.inputs.pair import InputPair, TestPrompt
from safetydpo_jax.data.inputs.picture import as_kept
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import CATEGORIES

VALIDATION_SHARE = 0.05
EXAMPLES = 256  # of a file, at the most, which is in memory while it is written
Example = dict[str, Any]
Shard = Callable[[], Iterator[tuple[str, Example]]]


class Builder(tfds.core.ShardBasedBuilder):
    """Configs `sd15` and `sdxl` hold the pairs that each model drew, `prompts` the test prompts.

    A split's examples have the same features in TFDS, and test prompts come without pictures: so
    they are a config of their own, with the splits `test` and `test_clean`, which lacks those
    that equal a training pair's unsafe prompt.

    Pairs of which a picture cannot be used are skipped; `metadata.json` counts them by reason.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS declares it so)
        tfds.core.BuilderConfig(name="sd15", description="pairs drawn by Stable Diffusion 1.5"),
        tfds.core.BuilderConfig(name="sdxl", description="pairs drawn by SDXL"),
        tfds.core.BuilderConfig(name="prompts", description="unsafe prompts for testing"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The pictures are downloaded by hand. Put the tables (CoProv2_train.csv, "
        "CoProv2_test.csv) into the manual folder, and a config's pictures, a zip, a folder or "
        "the hub's parquet files, into its folder sd15/ or sdxl/, or beside the tables."
    )

    def __init__(self, **kwargs: Any):
        self._skipped: dict[str, int] = {}  # filled when the pairs have been looked at
        super().__init__(**{"file_format": "array_record"} | kwargs)

    @property
    def _config_name(self) -> str:
        return cast("tfds.core.BuilderConfig", self.builder_config).name

    def _info(self) -> tfds.core.DatasetInfo:
        kinds = tfds.features.ClassLabel(names=CATEGORIES)
        features: dict[str, Any] = {"id": tfds.features.Text(doc="names it without showing it")}
        if self._config_name == "prompts":
            features |= {"prompt": tfds.features.Text(), "category": kinds}
        else:
            features |= {
                "prompt_unsafe": tfds.features.Text(),
                "prompt_safe": tfds.features.Text(),
                "image_unsafe": tfds.features.Image(shape=(None, None, 3)),
                "image_safe": tfds.features.Image(shape=(None, None, 3)),
                "categories": tfds.features.Sequence(kinds),
            }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pairs of an unsafe and a safe prompt with a picture of each.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://safetydpo.github.io/",
            citation="Liu et al. 2024, SafetyDPO, arXiv 2412.10493",
            metadata=tfds.core.MetadataDict(skipped=self._skipped),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Shard]]:
        tables = Path(dl_manager.manual_dir)
        name = self._config_name
        found = read_coprov2(tables / name if (tables / name).is_dir() else tables, tables)
        if name == "prompts":
            clean = [prompt for prompt in found.test if not prompt.in_train]
            prompts = {"test": found.test, "test_clean": clean}
            return self._splits(prompts, _prompt_example, tables)
        found = usable(found, print)
        self._skipped.update(collections.Counter(found.skipped.values()))
        held_out = [is_held_out(pair, VALIDATION_SHARE) for pair in found.pairs]
        pairs = {
            "train": list(itertools.compress(found.pairs, (not x for x in held_out))),
            "validation": list(itertools.compress(found.pairs, held_out)),
        }
        return self._splits(pairs, _pair_example, tables)

    def _splits(
        self, splits: Mapping[str, list], example: Callable[[Any], Example], tables: Path
    ) -> dict[str, list[Shard]]:
        """Of those that are not empty, file by file.

        A builder that leaves the files to TFDS imports TensorFlow for more than 1000 MB.
        """
        if not any(splits.values()):
            raise UserError(f"{tables} holds nothing for {' or '.join(splits)}")

        def shard(items: list) -> Iterator[tuple[str, Example]]:
            return ((item.id, example(item)) for item in items)

        return {
            name: [
                functools.partial(shard, items[i : i + EXAMPLES])
                for i in range(0, len(items), EXAMPLES)
            ]
            for name, items in splits.items()
            if items
        }


def _prompt_example(prompt: TestPrompt) -> Example:
    return {"id": prompt.id, "prompt": prompt.text, "category": prompt.category}


def _pair_example(pair: InputPair) -> Example:
    return {
        "id": pair.id,
        "prompt_unsafe": pair.unsafe.prompt,
        "prompt_safe": pair.safe.prompt,
        "image_unsafe": io.BytesIO(as_kept(pair.unsafe.read())),
        "image_safe": io.BytesIO(as_kept(pair.safe.read())),
        "categories": pair.categories,
    }
