"""A merged LoRA taught by its experts: what each answers to its category's prompts, for all.

Merging layer by layer, no method sees what the layers do together. Here the merged LoRA is the
student of all experts at once: under a prompt of a category it learns the answer of that expert,
under safe prompts and the empty one that of the base. As the teachers answer any input, no pairs
are wanted, only prompts; the pictures that are noised are the teachers' own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from safetydpo_jax import sharding, storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.evaluate.detections import fingerprint
from safetydpo_jax.lora.adapters import Adapters, scaled
from safetydpo_jax.merge.experts import Experts
from safetydpo_jax.merge.teachers import Teachers
from safetydpo_jax.models.conditioning import where
from safetydpo_jax.pace import Pace
from safetydpo_jax.train.losses import squared_error
from safetydpo_jax.train.state import Checkpoints, TrainState
from safetydpo_jax.train.step import compiler_options
from safetydpo_jax.train.workdir import stop_signal


@dataclasses.dataclass(frozen=True)
class Lessons:
    """How a student is taught; the defaults were chosen on the embedded model.

    Attributes:
      steps: updates.
      learning_rate: AdamW's, after a short warm-up falling to 0 along a cosine.
      batch_size: rows of a step over all devices, even: one half are prompts of the categories,
        equally many of each, the other half safe ones.
      preservation: how much the safe half counts beside the other.
      empty: the share of rows in which the prompt gives way to the empty one.
      text_noise: standard deviation of noise on the text states (theirs is about 1): what is
        learnt are answers to a neighbourhood of the prompts.
      start: what the student is multiplied by at first; 0 leaves it the inputs it looks at alone.
      seed: of rows, noise and timesteps.
      sampler: the teachers' pictures are drawn by it, with
      num_steps: its steps, and
      guidance_scale: as for a picture.
      matmul_precision: of all products: "bfloat16" operands with float32 sums, or "float32".
      remat: keep blocks' inputs alone for the gradient; the numbers are the same.
    """

    steps: int = 2000
    learning_rate: float = 2e-3
    batch_size: int = 32
    preservation: float = 10.0
    empty: float = 0.1
    text_noise: float = 0.4
    start: float = 1.0
    seed: int = 0
    sampler: str = "ddim"
    num_steps: int = 20
    guidance_scale: float = 7.5
    matmul_precision: str = "bfloat16"
    remat: bool = False

    @property
    def drawing(self) -> dict[str, Any]:
        """How the teachers' pictures are drawn."""
        names = ("sampler", "num_steps", "guidance_scale", "matmul_precision")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raises UserError for a value that cannot be."""
        limits = {"steps": 1, "batch_size": 2}
        limits |= dict.fromkeys(("preservation", "empty", "text_noise", "start"), 0)
        for name, least in limits.items():
            if not least <= (value := getattr(self, name)) < float("inf"):
                raise UserError(f"distillation: {name} is {value}: it must be at least {least}")
        if self.empty > 1:
            raise UserError(f"distillation: empty is {self.empty}, a share: it must be at most 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(
                f"distillation: the learning rate is {self.learning_rate}: it must be above 0"
            )
        if self.batch_size % 2:
            raise UserError(f"distillation: batch_size is {self.batch_size}: it must be even")


def distill(
    pipeline: Any,
    experts: Experts,
    student: Adapters,
    prompts: Sequence[str],
    categories: Sequence[str],
    lessons: Lessons,
    folder: Path,
    *,
    progress: Callable[[str], None] = print,
) -> Adapters:
    """Teaches a merged LoRA what its experts do.

    Args:
      pipeline: the base, a `models.pipeline.Pipeline`.
      experts: of that base, the teachers, each as strong as its weight says.
      student: adapters to begin with, as a merge made them; they keep their ranks.
      prompts: n texts, of every expert's category and safe ones.
      categories: of each prompt, an expert's name or `SAFE`; prompts of others are left out.
      lessons: how.
      folder: for the teachers' pictures, which students of other settings take too, and for
        checkpoints; a run that was stopped goes on from there. It is the caller's to remove.
      progress: takes lines of text: done, rate, time left.

    Returns:
      The adapters after the last step.

    Raises:
      UserError: a setting that cannot be, missing prompts, or a student that diverged.
      SystemExit: stopped by SIGTERM or Ctrl-C during the steps; the state is saved.
    """
    lessons.check()
    mesh = sharding.make_mesh()
    sharding.check_batch(mesh, batch_size=lessons.batch_size)
    teachers = Teachers(pipeline, experts, prompts, categories, mesh)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, lessons.learning_rate, min(20, lessons.steps // 10), lessons.steps
    )
    optimizer = optax.adamw(rate, weight_decay=0.0)
    settings = {
        **teachers.about,
        **{k: v for k, v in dataclasses.asdict(lessons).items() if k != "remat"},
        "student": fingerprint(student),
    }
    checkpoints = Checkpoints(folder / storage.digest(settings)[:16], settings, keep=1)
    student = scaled(student, lessons.start, 1)
    state = TrainState.create(student, optimizer)
    state = jax.device_put(checkpoints.restore(state) or state, sharding.replicated(mesh))
    if state.step:
        progress(f"distillation: going on from step {int(state.step)}")

    own, told = teachers.own, teachers.told
    with jax.default_matmul_precision(lessons.matmul_precision):
        pictures = teachers.pictures(
            folder,
            seed=lessons.seed,
            batch_size=lessons.batch_size,
            progress=progress,
            **lessons.drawing,
        )
        step = _make_step(pipeline, teachers, optimizer, lessons, mesh)
        split = sharding.batch_sharding(mesh)
        first, lost = int(state.step), []
        pace = Pace(lessons.steps - first)
        with stop_signal() as stop:
            for i in range(first, lessons.steps):
                index = rows_of_step(own, lessons.batch_size, lessons.seed, i)
                rows = pictures[index], jax.tree.map(lambda x, j=index: x[j], told), own[index]
                with jax.set_mesh(mesh):  # over which attention spreads a kernel of its own
                    state, loss = step(state, teachers.weights, jax.device_put(rows, split))
                lost.append(loss)
                done, last = i + 1, i + 1 == lessons.steps
                jax.block_until_ready(lost[-2:-1])  # a step ahead, no more: a stop is to be prompt
                if done % 50 == 0 or last or stop.asked:
                    errors = np.mean(jax.device_get(lost[-50:]), 0)
                    if not np.isfinite(errors).all():
                        raise UserError(
                            f"distillation: the student's error at step {done} is not finite: "
                            f"lower the learning rate ({lessons.learning_rate:g})"
                        )
                    checkpoints.save(state)
                    progress(
                        f"distillation: {done}/{lessons.steps} steps, error {errors[0]:.2e} where "
                        f"an expert acts, {errors[1]:.2e} where none does; "
                        f"{pace.rate(done - first):.2f} steps/s, "
                        f"{pace.left(done - first):.0f} s left"
                    )
                if stop.asked and not last:
                    progress(f"stopped: step {done} is saved in {folder}; the same command goes on")
                    raise SystemExit(128 + stop.asked)
    return jax.device_get(state.adapters)


def rows_of_step(own: Int[np.ndarray, " n"], size: int, seed: int, step: int) -> np.ndarray:
    """Which prompts a step takes: of the experts in turn, then as many safe ones.

    Args:
      own: of each prompt, its expert, -1 for a safe one.
      size: of the batch.
      seed: of the draw, with
      step: the number of the step.
    """
    rng = np.random.default_rng([seed, step])
    count = own.max() + 1
    turns = (rng.integers(count) + np.arange(size // 2)) % count
    chosen = [rng.choice(np.flatnonzero(own == expert)) for expert in turns]
    return np.array([*chosen, *rng.choice(np.flatnonzero(own == -1), size - size // 2)])


def _make_step(
    pipeline: Any,
    teachers: Teachers,
    optimizer: optax.GradientTransformation,
    lessons: Lessons,
    mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[TrainState, Float[Array, "2"]]]:
    """Compiles one update: (state, the teachers' weights, rows) to the state and both errors."""
    unet, schedule = pipeline.unet.clone(remat=lessons.remat), pipeline.schedule
    root = jax.random.key(lessons.seed, impl="threefry2x32")

    options = compiler_options(mesh, remat=True) if lessons.remat else None

    @functools.partial(jax.jit, compiler_options=options)
    def step(state, weights, rows):
        x0, told, own = rows
        keys = jax.random.split(jax.random.fold_in(root, state.step), 4)
        t = jax.random.randint(keys[0], (len(x0),), 0, schedule.num_train_timesteps)
        x = schedule.add_noise(x0, jax.random.normal(keys[1], x0.shape), t)
        states = told.prompt_embeds
        noise = lessons.text_noise * jax.random.normal(keys[2], states.shape)
        told = told._replace(prompt_embeds=states + noise)
        empty = jax.random.uniform(keys[3], (len(x0),)) < lessons.empty
        told, own = where(empty, teachers.null, told), jnp.where(empty, -1, own)

        def answers(adapters: Adapters) -> Array:
            return unet.apply({"params": weights[0], "lora": adapters}, x, t, *told)

        wanted = teachers.answer(weights, own, x, t, told)
        acting = own >= 0

        def loss(adapters: Adapters) -> tuple[Array, Array]:
            errors = squared_error(answers(adapters), wanted)
            both = jnp.stack([_mean(errors, acting), _mean(errors, ~acting)])
            return both[0] + lessons.preservation * both[1], both

        gradient, errors = jax.grad(loss, has_aux=True)(state.adapters)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        return TrainState(state.step + 1, adapters, opt_state), errors

    return step


def _mean(errors: Float[Array, "b"], rows: Bool[Array, "b"]) -> Float[Array, ""]:
    """Over these rows; 0 if there are none."""
    return jnp.sum(errors * rows) / jnp.maximum(rows.sum(), 1)
