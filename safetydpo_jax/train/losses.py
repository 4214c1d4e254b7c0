"""The preference losses, as pure functions of squared errors and predictions.

Sources: Wallace et al. 2023, Diffusion-DPO (arXiv 2311.12908); for safety, with the safe picture as
the winner, Liu et al. 2024, SafetyDPO (arXiv 2412.10493). Each preference loss is a function of a
pair's margin; its own source stands with it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from safetydpo_jax.lora.adapters import Adapters


def squared_error(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
    """Mean over height, width and channels, in float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=(1, 2, 3))


def preference_margin(
    winner: Float[Array, "b"], loser: Float[Array, "b"], beta: ArrayLike
) -> Float[Array, "b"]:
    """-beta / 2 (winner - loser), above 0 where the policy prefers the winner.

    It stands for beta h of the papers, h being log(policy / reference) of the winner less that of
    the loser. Winner and loser share caption, timestep and noise. diffusers' training script leaves
    out the half, so that its beta_dpo is half of this beta.

    Args:
      winner: squared error on the safe picture, the policy's less the reference's. Near the start
        the two are almost equal, so their difference is exact, where a difference of differences
        would have been rounded twice.
      loser: the same on the unsafe picture.
      beta: how sharply a preference counts.

    Example:
      >>> float(preference_margin(jnp.full(1, -0.5), jnp.zeros(1), beta=4.0)[0])
      1.0
    """
    return -0.5 * jnp.asarray(beta) * (winner - loser)


def dpo(margin: Float[Array, "b"]) -> Float[Array, "b"]:
    """-log sigmoid(margin), the loss of Diffusion-DPO."""
    return -jax.nn.log_sigmoid(margin)


def ipo(margin: Float[Array, "b"]) -> Float[Array, "b"]:
    """(margin - 1/2)^2: pulls every pair to one margin, and back from beyond it.

    It is beta^2 times the published (h - 1 / (2 beta))^2 of Azar et al. 2023 (arXiv 2310.12036), so
    that its scale beside the other terms does not hang on beta. diffusers' script, with beta_dpo =
    beta / 2, has 4 times the published value: the same minimum.
    """
    return jnp.square(margin - 0.5)


def hinge(margin: Float[Array, "b"]) -> Float[Array, "b"]:
    """max(0, 1 - margin): a pair with a margin of 1 has no more say.

    Source: Zhao et al. 2023, SLiC-HF (arXiv 2305.10425), here relative to the reference, as in Liu
    et al. 2023, RSO (arXiv 2309.06657).
    """
    return jax.nn.relu(1 - margin)


# What `config.loss.preference` may be. The mean over the batch is the caller's and comes after.
# "winner_preserving" is DPO with its gradient put together by `preserve_winner`.
PREFERENCES: dict[str, Callable[[Float[Array, "b"]], Float[Array, "b"]]] = {
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "winner_preserving": dpo,
}


def preserve_winner(winner: Adapters, loser: Adapters) -> tuple[Adapters, Float[Array, ""]]:
    """A preference loss's gradient with the loser's part scaled down where it harms the winner.

    Source: the safeguard of Fu et al. 2025, Diffusion-SDPO (arXiv 2511.03317), which estimates the
    scale in the space of the outputs. Here it is exact, from the gradients with respect to the
    adapters, and one for the whole batch.

    With G_w and G_l for the parts, a small step along -(G_w + s G_l) changes the winner's error by
    a multiple of -(|G_w|^2 + s <G_w, G_l>). So to first order the error, averaged over this batch
    with DPO's own weights, cannot rise if s = |G_w|^2 / -<G_w, G_l> where that is below 1, else 1.
    Nothing is promised of other batches, of a large step, of one that an optimiser bends (Adam
    gives each parameter its own rate and momentum), or once other terms' gradients are added.

    Args:
      winner: gradient of the loss through the winner's error alone.
      loser: through the loser's alone.

    Returns:
      The gradient G_w + s G_l, and s, from 0 to 1.
    """
    squared = optax.tree.norm(winner, squared=True)
    opposition = jnp.negative(optax.tree.vdot(winner, loser))
    harmful = opposition > squared
    scale = jnp.where(harmful, squared, 1.0) / jnp.where(harmful, opposition, 1.0)
    return optax.tree.add_scale(winner, scale, loser), scale
