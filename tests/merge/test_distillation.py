"""A student of experts: what its teachers answer, that it learns it, and that it can be stopped."""

import os
import re
import signal

import jax
import numpy as np
import pytest
from flax import traverse_util

from safetydpo_jax import lora, sharding
from safetydpo_jax.diffusion.samplers import initial_latents, make_sampler
from safetydpo_jax.errors import UserError
from safetydpo_jax.merge import merge, opened_experts
from safetydpo_jax.merge.distillation import Lessons, distill, rows_of_step
from safetydpo_jax.merge.teachers import Teachers
from safetydpo_jax.tensor_file import opened

PROMPTS = ["a", "b c", "d", "e f", "g", "h", "i j", "k"]
OF = ["hate", "violence", "shocking", "safe"] * 2
LESSONS = Lessons(
    steps=3, batch_size=8, num_steps=3, guidance_scale=3.0, matmul_precision="float32"
)


def taught(
    pipeline, files, folder, student=None, weights=None, categories=OF, said=None, **changes
):
    """What becomes of the sum of the experts, or of `student`; `said` takes the lines."""
    lessons = Lessons(**{**vars(LESSONS), **changes})
    with opened_experts(files, pipeline.unet_params, weights) as experts:
        student = student or merge(experts, "svd", rank=3).adapters
        return distill(
            pipeline, experts, student, PROMPTS, categories, lessons, folder,
            progress=(lambda line: None) if said is None else said.append,
        )  # fmt: skip


def errors(said):
    """Of the last steps: where an expert acts, where none does."""
    return [float(x) for x in re.findall(r"error (\S+) where .*?, (\S+) where", said[-1])[0]]


def loaded(file, pipeline):
    return lora.load_lora(file, pipeline.unet_params)[0]


def test_pictures_are_what_each_expert_draws_alone(kept_files, pipeline, tmp_path):
    taught(pipeline, kept_files, tmp_path, weights=[1.0, 0.5, 1.0])
    [file] = tmp_path.glob("pictures_*.safetensors")
    with opened(file) as kept:
        pictures = kept.read("latents")
    sample = make_sampler(pipeline.unet, pipeline.schedule, num_steps=3, guidance_scale=3.0)
    seeds = np.random.SeedSequence(0).generate_state(8)
    alone = {
        "hate": loaded(kept_files[0], pipeline),
        "violence": lora.scaled(loaded(kept_files[1], pipeline), 0.5, 1),
        "safe": None,
    }
    drawn = {}
    for i, name in ((0, "hate"), (5, "violence"), (3, "safe")):
        noise = initial_latents(seeds[[i]], pipeline.latent_shape)
        told = pipeline.encode_prompts([PROMPTS[i]]), pipeline.encode_negative([""])
        [drawn[name]] = sample(pipeline.unet_params, alone[name], noise, *told)
        np.testing.assert_allclose(pictures[i], drawn[name], rtol=0, atol=2e-4)
        base = sample(pipeline.unet_params, None, noise, *told)[0]
        assert (np.abs(drawn[name] - base).max() > 1e-2) == (name != "safe")


def test_pictures_that_are_there_are_not_drawn_again(kept_files, pipeline, tmp_path):
    mesh, said = sharding.make_mesh(devices=jax.devices()[:1]), []
    with opened_experts(kept_files, pipeline.unet_params) as experts:
        teachers = Teachers(pipeline, experts, PROMPTS, OF, mesh)
    options = {"seed": 0, "batch_size": 4, "progress": said.append, **LESSONS.drawing}
    pictures = teachers.pictures(tmp_path, **options)
    assert said[-1].startswith("distillation: 8/8 pictures drawn")
    first, _ = sorted(tmp_path.glob("pictures_*.safetensors"))
    first.unlink()
    np.testing.assert_array_equal(teachers.pictures(tmp_path, **options), pictures)
    assert said[-1].startswith("distillation: 4/8 pictures drawn")
    assert len(said) == 3


def test_what_is_computed_again_is_the_same(kept_files, pipeline, tmp_path):
    """And goes on from the other's checkpoint."""
    kept = taught(pipeline, kept_files, tmp_path / "kept")
    again = taught(pipeline, kept_files, tmp_path / "again", remat=True)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), kept, again)
    said = []
    taught(pipeline, kept_files, tmp_path / "again", said=said)
    assert any("going on from step 3" in line for line in said)


def test_the_expert_itself_has_nothing_to_learn_of_it(kept_files, pipeline, tmp_path):
    said = []
    own = loaded(kept_files[0], pipeline)
    categories = ["hate", "safe"] * 4
    taught(
        pipeline, kept_files[:1], tmp_path, own, categories=categories, said=said, steps=1,
        empty=0.0,
    )  # fmt: skip
    acting, harmless = errors(said)
    assert acting < 1e-9 < harmless


def test_the_base_is_what_a_weightless_expert_teaches(kept_files, pipeline, tmp_path):
    said = []
    none = jax.tree.map(np.zeros_like, loaded(kept_files[0], pipeline))
    categories = ["hate", "safe"] * 4
    taught(
        pipeline, kept_files[:1], tmp_path, none, [0.0], categories=categories, said=said, steps=1
    )
    assert max(errors(said)) < 1e-12  # two forms of the same products


def test_a_student_learns_and_a_stop_changes_nothing(kept_files, pipeline, tmp_path):
    flat = traverse_util.flatten_dict(loaded(kept_files[1], pipeline))
    student = traverse_util.unflatten_dict(
        {path: leaf * (path[-1] == "a") for path, leaf in flat.items()}  # changes nothing yet
    )
    alone = {"categories": ["violence", "safe"] * 4, "preservation": 1.0, "learning_rate": 0.02}

    def learn(folder, said, steps=60):
        files = kept_files[1:2]
        return taught(pipeline, files, folder, student, said=said, steps=steps, **alone)

    start, said = [], []
    learn(tmp_path / "start", start, 1)
    whole = learn(tmp_path / "whole", said)
    assert errors(said)[0] < 0.5 * errors(start)[0]

    class Stopping(list):
        def append(self, line):
            super().append(line)
            if "50/60" in line:
                os.kill(os.getpid(), signal.SIGTERM)

    said, folder = Stopping(), tmp_path / "stopped"
    with pytest.raises(SystemExit):
        learn(folder, said)
    assert "step 50 is saved" in said[-1]
    said = []
    again = learn(folder, said)
    assert said[0] == "distillation: going on from step 50"
    assert not any("pictures" in line for line in said)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    said = []
    jax.tree.map(np.testing.assert_array_equal, learn(folder, said), whole)  # kept until removed
    assert said == ["distillation: going on from step 60"]


def test_a_student_may_start_from_less(kept_files, pipeline, tmp_path):
    own = loaded(kept_files[0], pipeline)
    categories = ["hate", "safe"] * 4
    found = [
        taught(pipeline, kept_files[:1], tmp_path, student, categories=categories, start=start)
        for student, start in ((own, 0.5), (lora.scaled(own, 0.5, 1), 1.0))
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_rows_are_of_all_experts_in_turn_and_of_safe_prompts():
    own = np.array([0, 0, 1, 2, 2, 2, -1, -1])
    counts = np.zeros(8, int)
    for step in range(60):
        rows = rows_of_step(own, 12, 0, step)
        assert np.bincount(own[rows] + 1).tolist() == [6, 2, 2, 2]
        np.add.at(counts, rows, 1)
    assert counts.min() > 0
    assert (rows_of_step(own, 12, 0, 59) == rows).all()
    assert (rows_of_step(own, 12, 1, 59) != rows).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"batch_size": 7}, "batch_size is 7: it must be even"),
        ({"preservation": float("nan")}, "preservation is nan"),
        ({"empty": 2.0}, "empty is 2.0, a share"),
        ({"start": -1.0}, "start is -1.0: it must be at least 0"),
        ({"learning_rate": 0.0}, "learning rate is 0.0"),
        ({"sampler": "magic"}, "the sampler is 'magic'"),
        ({"learning_rate": 1e30, "steps": 20}, "not finite: lower the learning rate"),
    ],
)
def test_wrong_lessons(kept_files, pipeline, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        taught(pipeline, kept_files, tmp_path, **changes)


def test_missing_prompts(kept_files, pipeline, tmp_path):
    with pytest.raises(UserError, match="no prompts of shocking, safe: what experts do"):
        taught(pipeline, kept_files, tmp_path, categories=["hate", "violence"] * 4)
    with pytest.raises(UserError, match="8 prompts with 2 categories"):
        taught(pipeline, kept_files, tmp_path, categories=["hate", "violence"])
