"""Low-rank adapters as a collection of their own, and the files that hold them."""

from safetydpo_jax.lora.adapters import (
    Adapters,
    count,
    describe,
    init_adapters,
    module_paths,
    scaled,
)
from safetydpo_jax.lora.formats import load_lora, save_kohya, save_lora

__all__ = [
    "Adapters",
    "count",
    "describe",
    "init_adapters",
    "load_lora",
    "module_paths",
    "save_kohya",
    "save_lora",
    "scaled",
]
