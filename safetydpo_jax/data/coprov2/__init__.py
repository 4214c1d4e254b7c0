"""CoProV2 as a TFDS dataset: `tfds.builder("coprov2/sd15", ...)` once this is imported."""

from safetydpo_jax.data.coprov2.coprov2_dataset_builder import Builder

__all__ = ["Builder"]
