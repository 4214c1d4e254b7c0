"""What is compared: each merge method with its options, by a name for the table."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from safetydpo_jax.merge.distillation import Lessons


class Contender(NamedTuple):
    """A merge.

    Attributes:
      method: one of `merge.METHODS`.
      options: its own.
      lessons: if the result is taught by the experts after that.
    """

    method: str
    options: Mapping[str, Any] = MappingProxyType({})
    lessons: Lessons | None = None


def taught(**changes: Any) -> Lessons:
    """Lessons with pictures as the embedded world's are drawn."""
    return Lessons(sampler="dpmsolver++", num_steps=12, guidance_scale=4.0, **changes)


# Average, task arithmetic, concat and SVD are one direction and differ by a factor and a rank: one
# curve over the factor, at each rank, is all four's.
CONTENDERS = {
    "scaled sum": Contender("task_arithmetic"),
    "co_merge": Contender("co_merge"),
    "co_merge_soft": Contender("co_merge_soft"),
    "co_merge_soft, sharpness 4": Contender("co_merge_soft", {"sharpness": 4.0}),
    "co_merge_rows": Contender("co_merge_rows"),
    "ties, density 0.2": Contender("ties", {"density": 0.2}),
    "ties, density 0.6": Contender("ties", {"density": 0.6}),
    "dare, density 0.5": Contender("dare", {"density": 0.5}),
    "dare_ties, density 0.5": Contender("dare_ties", {"density": 0.5}),
    "magnitude_prune, density 0.3": Contender("magnitude_prune", {"density": 0.3}),
    "orthogonal, density 0.3": Contender("orthogonal", {"density": 0.3}),
    "regmean": Contender("regmean"),
    "regmean, preservation 0": Contender("regmean", {"preservation": 0.0}),
    "regmean, preservation 0.1": Contender("regmean", {"preservation": 0.1}),
    "distilled": Contender("svd", lessons=taught()),
    "distilled, 400 steps": Contender("svd", lessons=taught(steps=400)),
    "distilled, learning rate 5e-3": Contender("svd", lessons=taught(learning_rate=5e-3)),
    "distilled, preservation 2": Contender("svd", lessons=taught(preservation=2.0)),
    "distilled, from 0": Contender("svd", lessons=taught(start=0.0)),
    "distilled, no text noise": Contender("svd", lessons=taught(text_noise=0.0)),
    "distilled, from regmean": Contender("regmean", lessons=taught()),
}
