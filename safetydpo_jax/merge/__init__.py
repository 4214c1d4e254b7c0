"""Experts merged into one LoRA: methods in one registry, all on what an expert adds to a layer."""

from safetydpo_jax.merge.experts import Experts, opened_experts
from safetydpo_jax.merge.methods import METHODS
from safetydpo_jax.merge.run import Merged, merge

__all__ = ["METHODS", "Experts", "Merged", "merge", "opened_experts"]
