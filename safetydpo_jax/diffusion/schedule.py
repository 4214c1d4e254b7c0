"""The noise schedule of a diffusers checkpoint: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from safetydpo_jax.errors import UserError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

# The scheduler classes whose config describes this schedule; flow matching does not.
SCHEDULER_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# When the key is absent these classes clip x_0 to [-1, 1], which is for pixels, not for latents.
_CLIPPING_CLASSES = ("DDIMScheduler", "DDPMScheduler")

# Each sampler's own default where the checkpoint is silent, as in diffusers' `from_config`.
DEFAULT_SPACING = {"ddim": "leading", "dpmsolver++": "linspace", "euler": "linspace"}


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """How much noise there is at each training timestep, and what the model predicts.

    Hashable and compared by value, so that compiled samplers can be cached by it.

    Attributes:
      num_train_timesteps: T; timesteps run from 0 (clean) to T - 1.
      prediction_type: "epsilon" or "v_prediction".
      timestep_spacing: None leaves the choice to the sampler.
      set_alpha_to_one: DDIM's last step goes to abar = 1, not to abar_0.
      solver_options: options in the checkpoint's config that only some samplers know, as (name,
        value).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    solver_options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        _require("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _require("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            _require("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.num_train_timesteps < 1:
            raise UserError(
                f"the scheduler's num_train_timesteps is {self.num_train_timesteps}: "
                "it must be at least 1"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"the scheduler's trained_betas has {len(self.trained_betas)} values where "
                f"num_train_timesteps is {self.num_train_timesteps}: they must agree"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Builds the schedule from a diffusers `scheduler_config.json`.

        Args:
          config: the parsed file; absent keys take diffusers' defaults, unknown ones are ignored.

        Raises:
          UserError: the scheduler class or a value is not one this schedule can express.
        """
        name = config.get("_class_name", "DDIMScheduler")
        _require("_class_name", name, SCHEDULER_CLASSES)
        if config.get("clip_sample", name in _CLIPPING_CLASSES) or config.get("thresholding"):
            raise UserError(
                f"the scheduler ({name}) clips its samples, which is for pixels, not for latents: "
                'write "clip_sample": false and "thresholding": false in scheduler_config.json'
            )
        fields = {f.name for f in dataclasses.fields(cls)} - {"trained_betas", "solver_options"}
        betas = config.get("trained_betas")
        return cls(
            trained_betas=None if betas is None else tuple(betas),
            solver_options=tuple((k, config[k]) for k in sorted(_SOLVER_OPTIONS) if k in config),
            **{key: config[key] for key in fields & config.keys()},
        )

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t for t = 0 .. T - 1: float64 (T,), falling; abar_{T-1} is 0 if rescaled."""
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, steps)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        else:  # squaredcos_cap_v2, Nichol and Dhariwal 2021
            curve = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
        table = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:  # Lin et al. 2023 (arXiv 2305.08891), algorithm 1
            root = np.sqrt(table)
            table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        table.flags.writeable = False
        return table

    def timesteps(self, num_steps: int, sampler: str = "ddim") -> np.ndarray:
        """The timesteps a sampler visits, from noisy to clean.

        The formulas are those of diffusers' DDIMScheduler, DPMSolverMultistepScheduler and
        EulerDiscreteScheduler, which differ: DPM-Solver divides into one step more and leaves out
        the last (t = 0), and Euler does not round what linspace gives.

        Args:
          num_steps: number of model evaluations, 1 .. T.
          sampler: "ddim", "dpmsolver++" or "euler".

        Returns:
          int64 (num_steps,), strictly falling; float64 for Euler with linspace.

        Raises:
          UserError: unknown sampler, or a number of steps the schedule cannot give.
        """
        _require("sampler", sampler, tuple(DEFAULT_SPACING))
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise UserError(f"num_steps is {num_steps}: it must be from 1 to {total}")
        spacing = self.timestep_spacing or DEFAULT_SPACING[sampler]
        points = num_steps + (sampler == "dpmsolver++")
        if spacing == "trailing":
            falling = np.round(np.arange(total, 0, -total / num_steps)) - 1
        elif spacing == "linspace":
            falling = np.linspace(0, total - 1, points)[::-1]
            falling = falling if sampler == "euler" else falling.round()
        else:
            falling = (np.arange(points) * (total // points))[::-1] + self.steps_offset
        # Rounding makes arange one too long for some counts; diffusers then visits t = -1.
        timesteps = falling[:num_steps]
        if (timesteps == timesteps.round()).all():
            timesteps = timesteps.astype(np.int64)
        if timesteps[0] >= total or (np.diff(timesteps) >= 0).any():
            raise UserError(
                f"{num_steps} steps of {sampler} with timestep_spacing {spacing} and steps_offset "
                f"{self.steps_offset} repeat or pass the {total} timesteps there are: use fewer"
            )
        return timesteps

    def add_noise(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Integer[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """x_t, the noisy version of x0 at timesteps t."""
        alpha, sigma = self._alpha_sigma(t, x0.ndim)
        return alpha * x0 + sigma * noise

    def target(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Integer[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """What the model should answer: the noise, or v = alpha noise - sigma x0 (2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self._alpha_sigma(t, x0.ndim)
        return alpha * noise - sigma * x0

    def to_x0_and_noise(
        self, model_output: Float[Array, "b *d"], x_t: Float[Array, "b *d"], t: Integer[Array, "b"]
    ) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
        """The (x0, noise) that a model's answer at x_t stands for.

        With epsilon prediction x0 is not finite where abar_t = 0 (a rescaled schedule's last t).
        """
        alpha, sigma = self._alpha_sigma(t, x_t.ndim)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * model_output) / alpha, model_output
        return alpha * x_t - sigma * model_output, alpha * model_output + sigma * x_t

    def _alpha_sigma(self, t, ndim: int) -> tuple[Array, Array]:
        """sqrt(abar_t) and sqrt(1 - abar_t) in float32, shaped to broadcast over (b, ...)."""
        shape = t.shape + (1,) * (ndim - 1)
        alpha = jnp.asarray(np.sqrt(self.alphas_cumprod), jnp.float32)[t]
        sigma = jnp.asarray(np.sqrt(1 - self.alphas_cumprod), jnp.float32)[t]
        return alpha.reshape(shape), sigma.reshape(shape)

    def require_plain_solver(self, sampler: str) -> None:
        """Raises UserError if the checkpoint asks for another DPM-Solver++ or Euler than ours."""
        for key, value in self.solver_options:
            supported = _SOLVER_OPTIONS_OF[sampler].get(key)
            if supported and value not in supported:
                raise UserError(
                    f"the scheduler has {key} = {value!r}; the {sampler} sampler supports only "
                    f"{supported[0]!r}: use the ddim sampler"
                )


# Options and the values under which a sampler equals diffusers'.
_SIGMAS = {
    "final_sigmas_type": ("zero", None),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
}
_SOLVER_OPTIONS_OF = {
    "dpmsolver++": _SIGMAS
    | {
        "algorithm_type": ("dpmsolver++", "deis"),
        "lambda_min_clipped": (-math.inf, None),
        "solver_order": (2,),
        "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
        "use_flow_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
    },
    "euler": _SIGMAS
    | {
        "interpolation_type": ("linear", None),
        "sigma_max": (None,),
        "sigma_min": (None,),
        "timestep_type": ("discrete", None),
    },
}
_SOLVER_OPTIONS = {key for options in _SOLVER_OPTIONS_OF.values() for key in options}


def _require(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"the scheduler's {key} is {value!r}: it must be one of {', '.join(known)}")
