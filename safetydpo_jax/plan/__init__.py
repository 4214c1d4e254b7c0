"""What a run would take on accelerators that are not at hand: by their compiler, or by counting."""

from safetydpo_jax.plan.chips import slice_of, use_cpu
from safetydpo_jax.plan.report import draw, lines
from safetydpo_jax.plan.training import of_training

__all__ = ["draw", "lines", "of_training", "slice_of", "use_cpu"]
