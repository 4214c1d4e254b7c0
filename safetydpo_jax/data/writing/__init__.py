"""Prompt pairs from a list of unsafe concepts, written by a language model behind an endpoint.

concepts (`concepts`) -> requests, each answered once (`endpoint`, `journal`) -> pairs of an unsafe
prompt and a minimally different safe one (`answers`) -> a table a category (`tables`)
"""

from safetydpo_jax.data.writing.run import Settings, estimate, write_prompts

__all__ = ["Settings", "estimate", "write_prompts"]
