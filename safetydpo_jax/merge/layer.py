"""What a merge method gets to see: one layer of all experts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float

from safetydpo_jax.errors import UserError
from safetydpo_jax.merge.factors import Factors, stack

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Whitened:
    """A change whose error is to be measured on a layer's inputs, not on its entries.

    With the inputs' second moments L L^T, of all changes of a rank the one whose L^T D is nearest
    makes the least error in the layer's outputs.

    Attributes:
      factors: of L^T D.
      root: L, lower triangular, (in, in).
    """

    factors: Factors
    root: Float[np.ndarray, "in in"]


Delta = Factors | Whitened | Float[np.ndarray, "in out"]


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
class Inputs:
    """Second moments of a layer's inputs x, means over prompts of sums over tokens and steps.

    Attributes:
      harmful: x^T x under prompts of each category, added up.
      harmless: x^T x under safe prompts, and under the empty one.
      images: of each expert, x^T (x a) under prompts of its own category; None where it leaves the
        layer alone.
    """

    harmful: Float[np.ndarray, "in in"]
    harmless: Float[np.ndarray, "in in"]
    images: Sequence[Float[np.ndarray, "in _"] | None]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of all experts.

    Attributes:
      name: its dotted path.
      shape: of the change, (in, out); a convolution's (kh * kw * in, out).
      experts: what each adds, its weight within; None where it leaves the layer alone.
      votes: of the activations, if the method asks for them.
      seed: of the merge, for methods that draw.
      inputs: what the layer gets to see, if the method asks for that.
    """

    name: str
    shape: tuple[int, int]
    experts: Sequence[Factors | None]
    votes: Votes | None = None
    seed: int = 0
    inputs: Inputs | None = None

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
        """The votes; UserError if there are none of this layer."""
        return self._there(self.votes, "votes on")

    def seen(self) -> Inputs:
        """What is known of the inputs; UserError if nothing is."""
        return self._there(self.inputs, "inputs of")

    def _there(self, found: T | None, what: str) -> T:
        if found is None:
            raise UserError(
                f"{self.name}: the statistics have no {what} this layer: make them anew, from "
                "these experts and for this method"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
      change: (Layer, the method's own options by name) -> what the merged LoRA adds to the layer.
      needs: what of `Statistics` it asks for, "votes" or "inputs"; "" for nothing.
      keeps_rank: without a rank asked for the result has the sum of the experts' ranks, and is
        exact; else it has the highest of theirs.
      one_rank: whether it merges only experts of one rank that adapt the same layers.
    """

    change: Callable[..., Delta]
    needs: Literal["", "votes", "inputs"] = ""
    keeps_rank: bool = False
    one_rank: bool = False
