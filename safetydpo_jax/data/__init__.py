"""From prompts to batches: the pair factory, the cache, the loader."""

from safetydpo_jax.data.cache import Cache
from safetydpo_jax.data.draw import check_pairs, make_pairs
from safetydpo_jax.data.encode import (
    cache_key,
    check_resolution,
    encode_part,
    is_cached,
    make_cache,
)
from safetydpo_jax.data.loader import (
    STRATEGIES,
    Reference,
    batches,
    pair_batch,
    pair_rows,
    preserve_batch,
    preserve_rows,
)
from safetydpo_jax.data.pairs import (
    PairSet,
    Picture,
    PictureFile,
    mixing_weights,
    open_pairs,
    write_pairs,
)
from safetydpo_jax.data.sources import PairSource, source_of

__all__ = [
    "PairSource",
    "source_of",
    "make_pairs",
    "check_pairs",
    "PairSet",
    "open_pairs",
    "mixing_weights",
    "Picture",
    "PictureFile",
    "write_pairs",
    "Cache",
    "make_cache",
    "encode_part",
    "is_cached",
    "check_resolution",
    "cache_key",
    "STRATEGIES",
    "Reference",
    "batches",
    "pair_batch",
    "pair_rows",
    "preserve_batch",
    "preserve_rows",
]
