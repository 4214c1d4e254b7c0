"""The sum of the experts' changes, cut to a rank by SVD: what peft calls `svd`."""

from safetydpo_jax.merge.layer import Method
from safetydpo_jax.merge.methods.task_arithmetic import change

METHOD = Method(change)
