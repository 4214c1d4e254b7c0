"""Pair sets on disk, one or several read as one."""

from safetydpo_jax.data.pairs.joined import JoinedPairs, mixing_weights, open_pairs
from safetydpo_jax.data.pairs.pair_set import PairSet, Picture, PictureFile, write_pairs

__all__ = [
    "PairSet",
    "JoinedPairs",
    "open_pairs",
    "mixing_weights",
    "Picture",
    "PictureFile",
    "write_pairs",
]
