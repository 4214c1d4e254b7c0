"""Low-rank adapters as a collection of their own, and the files that hold them."""

from safetydpo_jax.lora.adapters import (
    Adapters,
    count,
    describe,
    init_adapters,
    module_paths,
    scaled,
)
from safetydpo_jax.lora.keys import BASE_HASH
from safetydpo_jax.lora.reader import LoraFile, load_lora, opened_lora
from safetydpo_jax.lora.writer import kohya_base, save_kohya, save_lora, save_peft

__all__ = [
    "BASE_HASH",
    "Adapters",
    "LoraFile",
    "count",
    "describe",
    "init_adapters",
    "kohya_base",
    "load_lora",
    "module_paths",
    "opened_lora",
    "save_kohya",
    "save_lora",
    "save_peft",
    "scaled",
]
