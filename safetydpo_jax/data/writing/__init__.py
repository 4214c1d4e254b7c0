"""Prompt pairs from a list of unsafe concepts, written by a language model.

concepts (`concepts`) -> requests, each answered once (`endpoint` or `local_model`, `journal`) ->
pairs of an unsafe prompt and a minimally different safe one (`answers`), judged (`judge`) -> a
table a category (`tables`)

`sources` has the pairs of a factory, of these tables or of the embedded world's grammar.
"""

from safetydpo_jax.data.writing.run import write_prompts
from safetydpo_jax.data.writing.settings import Settings, estimate, said

__all__ = ["Settings", "estimate", "said", "write_prompts"]
