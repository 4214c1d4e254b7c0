import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from safetydpo_jax import lora
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.evaluate import detect, exam
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.remote import CACHE_DIR
from safetydpo_jax.train import base, loop
from safetydpo_jax.train import health as health_module
from safetydpo_jax.train.guard import Guard
from safetydpo_jax.train.health import Health
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import learning_rate
from tests.evaluate import fakes
from tests.train.conftest import write_noise
from tests.train.test_board import points

EXPORT = pathlib.Path("export") / "pytorch_lora_weights.safetensors"
TERMS = {"loss", "preference_loss", "preservation", "winner_anchor"}
LOGGED = TERMS | {"margin", "implicit_accuracy", "winner_error", "loser_error", "grad_norm", "lr"}
TIMING = {"step_time", "wait_time", "pairs_per_s", "tflops_per_s"}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the run may catch it."""


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """The runs of this module share compiled steps, as most of them are the same."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads its settings only once
        if values is settings:
            yield


@pytest.fixture
def run(config, small, tmp_path, monkeypatch):
    """Runs in tmp_path/name; gives back what it said. `react` sees every line as it is said."""

    def load(path, **options):
        if path != str(small.path):
            return load_pipeline(path, **options)
        params = jax.device_put(small.unet_params, options["unet_shardings"](small.unet_params))
        return dataclasses.replace(small, unet_params=params)

    monkeypatch.setattr(base, "load_pipeline", load)

    def run(name="run", react=lambda line: None, **changes):
        lines = []

        def progress(line):
            lines.append(line)
            react(line)

        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        loop.run(changed, name if "://" in name else tmp_path / name, progress)
        return "\n".join(lines)

    return run


def logged_steps(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_whole_run(run, config, small, tmp_path):
    said = run()
    workdir = tmp_path / "run"
    banners = re.findall(r"=== (\d)/(\d) ([a-z ]+?) =", said)
    assert [int(number) for number, _, _ in banners] == list(range(1, 10))
    assert {total for _, total, _ in banners} == {"9"}
    steps = logged_steps(workdir)
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert steps[0].keys() == LOGGED | TIMING | {"step"}
    assert abs(steps[0]["margin"]) < 1e-3
    rate = learning_rate(resolve(config))
    assert [line["lr"] for line in steps] == pytest.approx([float(rate(i)) for i in range(10)])
    curve = [step for step, name, _ in points(workdir / "tensorboard") if name == "loss"]
    assert curve == list(range(1, 11))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} >= {"9", "10"}
    adapters, header = lora.load_lora(workdir / EXPORT, small.unet_params)
    assert (header["category"], header["steps"]) == ("hate", "10")
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adapters))

    before = (workdir / EXPORT).read_bytes()
    again = run()
    assert "compile" not in again
    assert (workdir / EXPORT).read_bytes() == before
    assert logged_steps(workdir) == steps


def test_goes_on_from_a_lora_of_another_run(run, small, tmp_path):
    run("first", steps=2)
    file = tmp_path / "first" / EXPORT
    changes = {"steps": 1, "lora.init": str(file), "lora.rank": 5, "lora.alpha": 10.0}
    said = run("second", **changes)
    assert f"adapters of rank 2 on 4 layers, 256 parameters, from {file}" in said
    line = logged_steps(tmp_path / "second")[0]
    assert line["margin"] != 0  # the policy is no longer the reference
    before, _ = lora.load_lora(file, small.unet_params)
    after, _ = lora.load_lora(tmp_path / "second" / EXPORT, small.unet_params)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    moved = [float(np.abs(a - b).max()) for a, b in pairs]
    assert 0 < max(moved) < 0.1  # by one step, and no factor lost
    other = tmp_path / "other.safetensors"
    lora.save_lora(other, before)
    moved_file = tmp_path / "moved.safetensors"
    moved_file.write_bytes(file.read_bytes())
    run("second", **(changes | {"lora.init": str(moved_file)}))
    with pytest.raises(UserError, match=r"lora\.init"):
        run("second", **(changes | {"lora.init": str(other)}))
    with pytest.raises(MissingFileError, match=r"nothing\.safetensors: no such file"):
        run("third", **{"lora.init": "nothing.safetensors"})


def test_the_losers_scale_is_shown_and_logged(run, tmp_path):
    said = run(steps=2, **{"loss.preference": "winner_preserving"})
    assert len(re.findall(r"^step \d/2: .* loser_scale [01]", said, re.M)) == 2
    assert all(0 < line["loser_scale"] <= 1 for line in logged_steps(tmp_path / "run"))


@pytest.mark.parametrize("step", [2, 5, 10])
def test_a_killed_run_ends_as_if_nothing_had_happened(step, run, tmp_path):
    run("whole")

    def kill(line):
        if line.startswith(f"step {step}/"):
            raise Killed

    with pytest.raises(Killed):
        run("killed", react=kill, log_every=1)
    run("killed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (killed / EXPORT).read_bytes() == (whole / EXPORT).read_bytes()
    for ours, theirs in zip(logged_steps(killed), logged_steps(whole), strict=True):
        assert {k: ours[k] for k in ours.keys() - TIMING} == {
            k: theirs[k] for k in theirs.keys() - TIMING
        }


def test_another_machine_goes_on(healthy, bucket, tmp_path, monkeypatch):
    """With nothing of the first but what is in the bucket."""
    rarely = {"checkpoint.every": 6}  # as each takes a copy
    healthy("whole", **rarely)
    home = f"{bucket}/run"

    def vanish(line):
        if line.startswith("step 8/"):
            raise Killed

    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "first"))
    with pytest.raises(Killed):
        healthy(home, react=vanish, **rarely)
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "second"))
    said = healthy(home, **rarely)
    assert f"{home}: fetching" in said
    assert "cache: encoding" not in said
    assert "going on from step 6" in said
    assert f"\nall of it     {home}\n" in said
    whole, there = tmp_path / "whole", bucket / "run"
    assert (there / EXPORT.as_posix()).read_bytes() == (whole / EXPORT).read_bytes()
    (local,) = (tmp_path / "second" / "runs").iterdir()
    assert [s["step"] for s in logged_steps(local)] == [s["step"] for s in logged_steps(whole)]
    for name in ("health/step_000004.json", "metrics.jsonl", "export/README.md"):
        assert (there / name).read_bytes() == (local / name).read_bytes()


@pytest.fixture
def healthy(run, monkeypatch):
    """`run` with small evaluations at steps 4, 8 and 10, drawn by a fake."""
    monkeypatch.setattr(exam, "EmojiJudge", lambda unsafe_names: fakes.Judge())
    monkeypatch.setattr(loop, "check_drawable", lambda config, pipeline: None)  # they are small
    monkeypatch.setattr(
        exam, "detect", functools.partial(detect, draw=fakes.Drawer(), label="fake")
    )
    changes = {"health.every": 4, "health.num_unsafe": 4, "health.num_safe": 4, "log_every": 1}
    return functools.partial(run, **changes)


def test_evaluations_on_the_way(healthy, run, tmp_path):
    said = healthy("whole")
    assert [int(n) for n in re.findall(r"health at step (\d+)", said)] == [0, 4, 8, 10]
    assert "step 10 is exported" in said
    assert "health at step" not in healthy("whole")
    run("without")  # the same numbers; only the header may differ
    whole, without = (tmp_path / name / EXPORT for name in ("whole", "without"))
    assert whole.read_bytes() == without.read_bytes()

    def kill(line):
        if line.startswith("health at step 8"):
            raise Killed

    with pytest.raises(Killed):
        healthy("killed", react=kill)
    assert "health at step 10" in healthy("killed")
    assert (tmp_path / "killed" / EXPORT).read_bytes() == whole.read_bytes()
    records = [(tmp_path / n / "health" / "step_000008.json") for n in ("whole", "killed")]
    assert records[0].read_bytes() == records[1].read_bytes()


def test_a_signal_during_an_evaluation(healthy, tmp_path):
    healthy("whole")

    def stop(line):
        if line.startswith(("health at step 4", "health at step 10")):
            os.kill(os.getpid(), signal.SIGTERM)

    for step in (4, 10):
        with pytest.raises(SystemExit):
            healthy("stopped", react=stop)
        assert logged_steps(tmp_path / "stopped")[-1]["step"] == step
    assert not (tmp_path / "stopped" / EXPORT).exists()
    healthy("stopped")
    exports = [(tmp_path / name / EXPORT).read_bytes() for name in ("whole", "stopped")]
    assert exports[0] == exports[1]


def test_early_stop(healthy, tmp_path, monkeypatch):
    def choose(records, budget):  # the first trained one, whatever comes after it
        return next((record for record in records if record["step"]), None)

    monkeypatch.setattr(health_module, "choose", choose)
    said = healthy("run", **{"health.patience": 1})
    assert "stopped early at step 8" in said
    assert logged_steps(tmp_path / "run")[-1]["step"] == 8
    assert "step 4 is exported" in said
    export = (tmp_path / "run" / EXPORT).read_bytes()
    again = healthy("run", **{"health.patience": 1})
    assert "compile" not in again
    assert "stopped early at step 8, by config.health.patience = 1: 0 goes on to step 10" in again
    assert (tmp_path / "run" / EXPORT).read_bytes() == export


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 4), (signal.SIGINT, 4), (signal.SIGTERM, 9)]
)
def test_a_signal_ends_the_run_with_its_step_saved(number, step, run, tmp_path):
    """Even in the last step, after which there is none to look for it."""
    run("whole")

    def stop(line):
        if line.startswith(f"step {step}/"):
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as end:
        run("stopped", react=stop, log_every=1)
    assert end.value.code == 128 + number
    assert len(logged_steps(tmp_path / "stopped")) in (step + 1, step + 2)
    assert not (tmp_path / "stopped" / EXPORT).exists()
    assert "going on from step" in run("stopped")
    assert (tmp_path / "stopped" / EXPORT).read_bytes() == (
        tmp_path / "whole" / EXPORT
    ).read_bytes()


def test_a_finished_run_can_be_made_longer(run, tmp_path):
    run("short", steps=4)
    assert "going on from step 4" in run("short")
    run("long")
    assert (tmp_path / "short" / EXPORT).read_bytes() == (tmp_path / "long" / EXPORT).read_bytes()


def test_a_diverged_run_stops_and_keeps_the_last_good_state(run, tmp_path):
    with pytest.raises(UserError, match=r"became nan at step \d+; the last good state"):
        run(**{"optimizer.learning_rate": 1e30})
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()
    assert not (tmp_path / "run" / "export").exists()


def test_a_collapsing_winner_stops_the_run(run):
    changes = {"guard.winner_error": 1e-9, "guard.patience": 3, "optimizer.learning_rate": 0.5}
    with pytest.raises(UserError, match=r"the winner is collapsing: for 3 steps"):
        run(recipe="paper", **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "nowhere"}, MissingFileError, "nowhere: no such folder"),
        ({"pairs.path": "nowhere"}, MissingFileError, "nowhere"),
        ({"lora.rank": 99}, UserError, r"lora.rank is 99, but .* use a rank from 1 to"),
        ({"lora.targets": ("to_x",)}, UserError, "'to_x' matches no layer of the UNet"),
        ({"base": "sdxl"}, UserError, "not SDXL, and the config is for sdxl: .* NAME:sd15"),
        ({"pairs.path": ""}, UserError, "draws 16 px, .* embedded model of 64 px"),
        ({"batch_size": 12}, UserError, "batch_size is 12, which does not divide over 8 devices"),
        (
            {"batch_size": 4, "accumulation": 4, "preserve_batch_size": 4},
            UserError,
            r"over 8 devices: use 8; --config.batch_size=8 --config.preserve_batch_size=8 "
            r"--config.accumulation=2 is the same update \(for a new run",
        ),
        ({"mesh.data": 3}, UserError, "data 3 x fsdp 1 x tensor 1 is not the 8 devices"),
        ({"loss.t_max": 2000}, UserError, "t_max 2000"),
        ({"rows": "all"}, UserError, "config.rows is 'all'"),
        ({"optimizer.b2": 1.0}, UserError, "config.optimizer.b2 is 1.0: it must be 0 to 1"),
        ({"lora.init": "gone.safetensors"}, MissingFileError, "gone.safetensors"),
        ({"cache.dtype": "int8"}, UserError, "int8"),
        ({"report.enabled": True, "report.split": "val"}, UserError, "report.split is 'val'"),
    ],
)
def test_bad_inputs_are_told_before_anything_is_trained(changes, error, message, run, tmp_path):
    with pytest.raises(error, match=message):
        run(**changes)
    for name in ("cache", "cache.partial", "checkpoints/0"):
        assert not (tmp_path / "run" / name).exists()


def test_other_settings_are_refused(run):
    run(steps=2)
    with pytest.raises(UserError, match=r"lora.rank = 2, but now it is 4: .* --workdir"):
        run(**{"lora.rank": 4, "lora.alpha": 2.0})


def test_a_refused_run_leaves_the_cache(run, tmp_path):
    run(steps=2)
    card = tmp_path / "run" / "cache" / "card.json"
    before = card.read_bytes()
    with pytest.raises(UserError, match="the pairs' hash = "):
        run(steps=2, **{"cache.dtype": "bfloat16"})
    assert card.read_bytes() == before


def test_fewer_steps_than_were_made(run):
    run(steps=3)
    with pytest.raises(UserError, match=r"is at step 3, past config.steps = 2"):
        run(steps=2)


def test_a_workdir_is_for_one_run_at_a_time(run):
    def begin_another(line):
        if "base model" in line:
            with pytest.raises(
                UserError, match=rf"in use by another run \(process {os.getpid()}\)"
            ):
                run()
            raise Killed

    with pytest.raises(Killed):
        run(react=begin_another)


def test_a_workdir_that_is_a_file(run, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot be used"):
        run()


@pytest.fixture
def three(config, tmp_path):
    """Changes that make the run one of three experts, each with pairs of its own."""
    with config.unlocked():
        config.experts = {"hate": {}, "violence": {"steps": 6}, "sexual": {"seed": None}}
        config.presets = {}
    for seed, name in enumerate(config.experts):
        write_noise(tmp_path / "pair_sets" / name, seed)
    return {"pairs.path": str(tmp_path / "pair_sets")}


def test_experts_of_one_run_are_as_if_alone(three, run, config, small, tmp_path):
    config.matmul_precision = "float32"  # rounding to bfloat16 would tell them apart
    said = run("all", **three)
    assert re.findall(r"=== (\d+)/11 (?:compile|train) (\d)", said) == [
        ("6", "1"), ("7", "1"), ("8", "2"), ("9", "2")
    ]  # fmt: skip
    assert re.search(r"^violence: step 6/6: loss", said, re.M)
    with config.unlocked():
        del config["experts"], config["presets"]
    exports = []
    for name, steps in (("hate", 10), ("violence", 6), ("sexual", 10)):
        changes = {"category": name, "steps": steps, "pairs.path": f"{three['pairs.path']}/{name}"}
        run("alone", **changes)
        folder, alone = tmp_path / "all" / name, tmp_path / "alone"
        ours, header = lora.load_lora(folder / EXPORT, small.unet_params)
        theirs, own_header = lora.load_lora(alone / EXPORT, small.unet_params)
        assert header == own_header
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.linalg.norm(x - y) < 1e-3 * np.linalg.norm(y)
        assert [line["step"] for line in logged_steps(folder)] == list(range(1, steps + 1))
        assert logged_steps(folder)[0].keys() == logged_steps(alone)[0].keys()
        assert f"Safety LoRA against {name}" in (folder / "export" / "README.md").read_text()
        exports.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(theirs)]))
        shutil.rmtree(alone)
    for x, y in itertools.combinations(exports, 2):  # they are not all the same
        assert np.linalg.norm(x - y) > 0.02 * np.linalg.norm(y)


def test_a_killed_run_of_several_goes_on(three, run, tmp_path):
    run("whole", **three)
    given = {"cache.path": str(tmp_path / "whole"), "steps": 1, "experts.violence.steps": 1}
    run("of their caches", **three, **given)
    assert (tmp_path / "of their caches" / "violence" / EXPORT).is_file()

    def kill(line):
        if line.startswith(("hate: step 5/", "violence: step 4/")):
            raise Killed

    for _ in range(2):  # in the first cohort, in the second
        with pytest.raises(Killed):
            run("killed", react=kill, log_every=1, **three)
    run("killed", **three)
    for name in ("hate", "violence", "sexual"):
        whole, killed = (tmp_path / folder / name / EXPORT for folder in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()
    with pytest.raises(UserError, match=r"hate, lora\.alpha = 2.0, but now it is 3.0"):
        run("whole", **three, **{"lora.alpha": 3.0})
    with pytest.raises(UserError, match=r"cohort_1"):  # all three are now one
        run("whole", **three, **{"experts.violence.steps": 10})


def test_an_expert_without_hope_holds_up_no_other(three, healthy, tmp_path, monkeypatch):
    """It is no longer evaluated, and its numbers end no run."""
    hopeless = Health.hopeless.fget

    def of_hate(self):
        return hopeless(self) or (self._config.category == "hate" and len(self.records) > 1)

    monkeypatch.setattr(Health, "hopeless", property(of_hate))

    def check(self, step, metrics):
        if self._category == "hate" and step > 4:
            raise Killed
        self._strikes = 1 if self._category == "hate" else 0

    monkeypatch.setattr(Guard, "check", check)
    said = healthy("run", **three)
    found = re.findall(r"^(\w+): health at step (\d+)", said, re.M)
    assert [int(n) for name, n in found if name == "hate"] == [0, 4]
    assert [int(n) for name, n in found if name == "sexual"] == [0, 4, 8, 10]
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints" / "cohort_1") as manager:
        only = ocp.args.Composite(state=ocp.args.StandardRestore())
        before, after = (
            jax.tree.leaves(manager.restore(step, args=only).state["adapters"]) for step in (9, 10)
        )
    for x, y in zip(before, after, strict=True):  # hate stays as it is
        np.testing.assert_array_equal(x[0], y[0])
    assert any((x[1] != y[1]).any() for x, y in zip(before, after, strict=True))


def test_evaluations_of_several_on_the_way(three, healthy, tmp_path):
    said = healthy("run", **three)
    found = re.findall(r"^(\w+): health at step (\d+)", said, re.M)
    assert [int(n) for name, n in found if name == "sexual"] == [0, 4, 8, 10]
    assert [int(n) for name, n in found if name == "violence"] == [0, 4, 6]
    assert "violence: step 6 is exported" in said
