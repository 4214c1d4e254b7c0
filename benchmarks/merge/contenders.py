"""What is compared: each merge method with its options, by a name for the table."""

from typing import Any, NamedTuple


class Contender(NamedTuple):
    """A method with its options.

    Attributes:
      method: one of `merge.METHODS`.
      options: its own.
    """

    method: str
    options: dict[str, Any]


# Average, task arithmetic, concat and SVD are one direction and differ by a factor and a rank: one
# curve over the factor, at each rank, is all four's.
CONTENDERS = {
    "scaled sum": Contender("task_arithmetic", {}),
    "co_merge": Contender("co_merge", {}),
    "co_merge_soft": Contender("co_merge_soft", {}),
    "co_merge_soft, sharpness 4": Contender("co_merge_soft", {"sharpness": 4.0}),
    "co_merge_rows": Contender("co_merge_rows", {}),
    "ties, density 0.2": Contender("ties", {"density": 0.2}),
    "ties, density 0.6": Contender("ties", {"density": 0.6}),
    "dare, density 0.5": Contender("dare", {"density": 0.5}),
    "dare_ties, density 0.5": Contender("dare_ties", {"density": 0.5}),
    "magnitude_prune, density 0.3": Contender("magnitude_prune", {"density": 0.3}),
    "orthogonal, density 0.3": Contender("orthogonal", {"density": 0.3}),
    "regmean": Contender("regmean", {}),
    "regmean, preservation 0": Contender("regmean", {"preservation": 0.0}),
    "regmean, preservation 0.1": Contender("regmean", {"preservation": 0.1}),
}
