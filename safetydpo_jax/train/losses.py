"""The preference losses, as pure functions of squared errors and predictions.

Source: Wallace et al. 2023, Diffusion-DPO (arXiv 2311.12908); for safety, with the safe picture as
the winner, Liu et al. 2024, SafetyDPO (arXiv 2412.10493).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class DPO(NamedTuple):
    """Per example: the loss, the logit it is taken of, and whether the logit is positive."""

    loss: Float[Array, "b"]
    margin: Float[Array, "b"]
    correct: Bool[Array, "b"]


def squared_error(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
    """Mean over height, width and channels, in float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=(1, 2, 3))


def dpo_loss(
    policy_winner: Float[Array, "b"],
    policy_loser: Float[Array, "b"],
    reference_winner: Float[Array, "b"],
    reference_loser: Float[Array, "b"],
    beta: float,
) -> DPO:
    """-log sigmoid(margin), with margin = -beta / 2 [(e_w - e_l) - (e_w_ref - e_l_ref)].

    Winner and loser share caption, timestep and noise. The mean over the batch is the caller's and
    comes after the log-sigmoid.

    Args:
      policy_winner: squared error of the policy on the safe picture.
      policy_loser: the same on the unsafe picture.
      reference_winner: squared error of the frozen model on the safe picture.
      reference_loser: the same on the unsafe picture.
      beta: how sharply a preference counts.

    Example:
      >>> one, half = jnp.ones(1), jnp.full(1, 0.5)
      >>> float(dpo_loss(half, one, one, one, beta=4.0).margin[0])
      1.0
    """
    # Each picture against its own reference first: near the start the two are almost equal, so
    # their difference is exact, where a difference of differences would have been rounded twice.
    winner = policy_winner - reference_winner
    loser = policy_loser - reference_loser
    margin = -0.5 * beta * (winner - loser)
    return DPO(-jax.nn.log_sigmoid(margin), margin, margin > 0)
