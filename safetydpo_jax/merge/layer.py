"""What a merge method gets to see: one layer of all experts."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.factors import Factors, stack

Delta = Factors | Float[np.ndarray, "in out"]


@dataclasses.dataclass(frozen=True)
class Votes:
    """How often each expert was the most active, summed over what was asked for.

    Attributes:
      outputs: of each of the layer's outputs, (experts, out).
      ranks: of each of the experts' own rank units, (experts, rank); None where ranks differ.
    """

    outputs: Float[np.ndarray, "experts out"]
    ranks: Float[np.ndarray, "experts rank"] | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of all experts.

    Attributes:
      name: its dotted path.
      shape: of the change, (in, out); a convolution's (kh * kw * in, out).
      experts: what each adds, its weight within; None where it leaves the layer alone.
      votes: of the activations, if the method asks for them.
      seed: of the merge, for methods that draw.
    """

    name: str
    shape: tuple[int, int]
    experts: Sequence[Factors | None]
    votes: Votes | None = None
    seed: int = 0

    @property
    def present(self) -> list[Factors]:
        """Those of the experts that change the layer."""
        return [x for x in self.experts if x is not None]

    @property
    def total(self) -> Factors:
        """The sum of the changes, exactly."""
        return stack(self.present)

    def deltas(self) -> list[Float[np.ndarray, "in out"]]:
        """Every expert's change whole, zeros where it leaves the layer alone."""
        return [np.zeros(self.shape, np.float32) if x is None else x.delta for x in self.experts]

    def counted(self) -> Votes:
        """The votes.

        Raises:
          UserError: there are none of this layer.
        """
        if self.votes is None:
            raise UserError(
                f"{self.name}: the statistics have no votes on this layer: make them anew, from "
                "these experts"
            )
        return self.votes


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
      change: (Layer, the method's own options by name) -> what the merged LoRA adds to the layer.
      needs_votes: it asks which experts are active where.
      keeps_rank: without a rank asked for the result has the sum of the experts' ranks, and is
        exact; else it has the highest of theirs.
    """

    change: Callable[..., Delta]
    needs_votes: bool = False
    keeps_rank: bool = False
