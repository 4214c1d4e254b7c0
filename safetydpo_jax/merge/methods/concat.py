"""The sum of the experts' changes with nothing lost: factors side by side, ranks added up."""

from safetydpo_jax.merge.layer import Method
from safetydpo_jax.merge.methods.task_arithmetic import change

METHOD = Method(change, keeps_rank=True)
