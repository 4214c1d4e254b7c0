"""Evaluations on the way: the rule that chooses, what is kept, and what a resumed run does."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import common
from safetydpo_jax import lora
from safetydpo_jax.errors import UserError
from safetydpo_jax.evaluate import detect, exam
from safetydpo_jax.train.health import Health, choose
from tests.evaluate import fakes


def record(step, ip, loss, n=50):
    def error(p):
        return max((p * (1 - p) / n) ** 0.5, 1 / n)

    return {
        "step": step,
        "ip": ip,
        "ip_error": error(ip),
        "fidelity_loss": loss,
        "fidelity_loss_error": error(abs(loss)),
    }


BASE = record(0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("records", "chosen"),
    [
        ([BASE], None),
        ([BASE, record(1, 0.5, 0.0)], 1),
        ([BASE, record(1, 0.5, 0.0), record(2, 0.1, 0.0)], 2),
        ([BASE, record(1, 0.1, 0.0), record(2, 0.5, 0.0)], 1),
        # Over the budget by more than a standard error, however low the IP.
        ([BASE, record(1, 0.3, 0.02), record(2, 0.0, 0.2)], 1),
        # Over it, but within a standard error of it: few pictures cannot tell.
        ([BASE, record(1, 0.3, 0.02), record(2, 0.0, 0.06)], 2),
        # Within a standard error, or one picture, of the lowest: the latest.
        ([BASE, record(1, 0.30, 0.0), record(2, 0.34, 0.0), record(3, 0.60, 0.0)], 2),
        ([BASE, record(1, 0.00, 0.0), record(2, 0.02, 0.0), record(3, 0.06, 0.0)], 2),
        # None is within the budget: the smallest loss.
        ([BASE, record(1, 0.3, 0.3), record(2, 0.0, 0.25), record(3, 0.0, 0.4)], 2),
    ],
)
def test_the_rule(records, chosen):
    choice = choose(records, budget=0.03)
    assert (choice and choice["step"]) == chosen


class Pipeline:
    """Adapters of one layer change what the fake draws; see fakes.Drawer."""

    unet_params = {"to_q": {"kernel": np.ones((2, 2), np.float32)}}  # noqa: RUF012
    vae_params = text_params = unet_params
    num_devices = 1


@pytest.fixture
def make(tmp_path, monkeypatch):
    drawer = fakes.Drawer()
    monkeypatch.setattr(exam, "EmojiJudge", lambda unsafe_names: fakes.Judge())
    monkeypatch.setattr(exam, "detect", functools.partial(detect, draw=drawer))
    lines = []

    def make(**changes):
        config = common.get_config("hate")
        config.steps, config.lora.alpha = 10, 16.0
        config.health.update({"every": 4, "num_unsafe": 12, "num_safe": 9})
        config.update_from_flattened_dict(changes)
        return Health(config, Pipeline(), tmp_path, lines.append)

    make.drawer, make.lines = drawer, lines
    return make


def adapters(step):
    return {"to_q": {"a": np.full((2, 1), step, np.float32), "b": np.ones((1, 2), np.float32)}}


def measure(health, steps):
    for step in steps:
        health.measure(step, adapters(step), {"steps": str(step)})


def test_when_it_is_due(make):
    health = make()
    assert [step for step in range(11) if health.due(step)] == [0, 4, 8, 10]
    measure(health, [0, 4])
    assert [step for step in range(11) if health.due(step)] == [8, 10]


def test_what_it_measures_and_keeps(make, tmp_path):
    health = make()
    measure(health, [0, 4, 8, 10])
    base, trained = health.records[0], health.records[-1]
    assert (base["ip"], base["fidelity_loss"], base["fidelity"]) == (1.0, 0.0, 1.0)
    assert trained["ip"] < 0.6
    assert trained["counterpart"] == pytest.approx(1 - trained["ip"])
    assert trained["ip_error"] >= 1 / 12
    # The fake does the same with any adapters, so the last of the equals is chosen and exported.
    assert health.choice["step"] == 10
    said = health.export(tmp_path / "export" / "lora.safetensors")
    assert said.startswith("step 10 is exported: IP ")
    exported, header = lora.load_lora(
        tmp_path / "export" / "lora.safetensors", Pipeline.unet_params
    )
    assert header["steps"] == "10"
    np.testing.assert_array_equal(exported["to_q"]["a"], adapters(10)["to_q"]["a"])
    with Image.open(tmp_path / "health" / "samples.png") as sheet:
        four, width = sheet.height, sheet.width
    assert health.sheet(health.records[:1]).height < four
    shutil.rmtree(tmp_path / "health" / "drawn")  # unblurred as they are
    health.export(tmp_path / "again.safetensors")
    with Image.open(tmp_path / "health" / "samples.png") as sheet:
        assert sheet.height == four
    assert width > 1000
    history = health.history()
    assert history["chosen_step"] == 10
    assert [row["step"] for row in history["evaluations"]] == [0, 4, 8, 10]
    prompts = {p.text for records in health._exam._prompts.values() for p in records}
    told = "\n".join(make.lines) + "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert not any(text in told for text in prompts)


def test_a_resumed_run_takes_up_its_evaluations(make, tmp_path):
    measure(make(), [0, 4, 8])
    batches = make.drawer.batches
    health = make()
    health.resume(5)  # the checkpoint is of step 5: step 8 will come again
    assert [r["step"] for r in health.records] == [0, 4]
    assert health.due(8)
    left = {path.name for path in (tmp_path / "health").rglob("step_000008*")}
    assert not left  # adapters and pictures neither
    measure(health, [8])
    assert make.drawer.batches == batches  # the same adapters: their pictures are on disk
    json.loads((tmp_path / "health" / "step_000008.json").read_text())


def test_other_settings_are_refused(make):
    measure(make(), [0])
    with pytest.raises(UserError, match=r"health.num_safe = 9, but now it is 10"):
        make(**{"health.num_safe": 10}).resume(0)
    with pytest.raises(UserError, match=r"the prompts' hash = "):
        make(category="violence").resume(0)


def test_hopeless_when_later_ones_are_worse(make):
    health = make(**{"health.patience": 2})
    health.records = [BASE, record(4, 0.1, 0.0), record(8, 0.5, 0.0)]
    assert not health.hopeless
    health.records.append(record(9, 0.5, 0.0))
    assert health.hopeless
    assert health.choice["step"] == 4
    never = make(**{"health.patience": 0})
    never.records = health.records
    assert not never.hopeless


def test_prompts_without_a_judge(tmp_path, monkeypatch):
    """On another base the user's own prompts are drawn, blurred, and the last step is exported."""

    def draw(pipeline, texts, seeds, *, adapters, **settings):
        assert (len(texts), settings["num_steps"]) == (2, 25)
        return np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)

    monkeypatch.setattr(exam, "draw_pictures", draw)
    config = common.get_config("hate", "sd15")
    config.steps, config.health.every = 4, 2
    with pytest.raises(UserError, match="there is no judge for sd15: give prompts to draw"):
        Health(config, Pipeline(), tmp_path, print)
    config.health.prompts = ("one", "two")
    lines = []
    config.lora.alpha = 16.0
    health = Health(config, Pipeline(), tmp_path, lines.append)
    measure(health, [0, 2, 4])
    assert (health.choice["step"], health.hopeless) == (4, False)
    assert health.export(tmp_path / "x.safetensors") == "step 4 is exported"
    assert health.history()["evaluations"] == [{"step": 0}, {"step": 2}, {"step": 4}]
    assert all(part["hide"] == [True, True] for r in health.records for part in r["shown"])
    assert health.sheet(health.records).height > health.sheet(health.records[:1]).height
    assert not any("one" in line or "two" in line for line in lines)


def test_over_the_budget_is_said(make, tmp_path):
    health = make()
    measure(health, [4])
    health.records[-1]["fidelity_loss"] = 0.5
    assert "no step kept fidelity within the budget" in health.export(tmp_path / "x.safetensors")
