"""How benchmarks/merge reads curves, and the LoRAs that it ships."""

import json

import jax
import numpy as np
import pytest

from benchmarks.merge import errors, scaling
from benchmarks.merge.contenders import CONTENDERS
from benchmarks.merge.curves import LOSS, PAST, Point, ip_at_loss, passes, search
from benchmarks.merge.in_torch import same
from benchmarks.merge.report import Curve, Read, in_percent, ip_with_interval
from benchmarks.merge.train import LORAS, lora
from benchmarks.merge.votes import agreement
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.lora import load_lora
from safetydpo_jax.merge.moments import SAFE
from safetydpo_jax.merge.run import check
from safetydpo_jax.merge.statistics import Statistics
from safetydpo_jax.models.pretrained import load_pipeline


def point(scale, ip, fidelity, count=1000):
    def bits(rate):
        return np.arange(count) < round(rate * count)

    return Point(scale, {"hate": bits(ip)}, {"hate": bits(0)}, bits(fidelity), bits(0.01))


@pytest.mark.parametrize("lost_at_1", [0.015, 0.03, 0.08])
def test_the_search_ends_on_both_sides_of_the_loss(lost_at_1):
    measured = []

    def measure(scale):
        measured.append(scale)
        return point(scale, max(1 - scale, 0), 0.95 - min(lost_at_1 * scale, 0.9))

    base = point(0, 1, 0.95)
    found = search(measure, base)
    scales = [p.scale for p in found]
    assert scales == sorted(scales)
    losses = [0.95 - p.faithful.mean() for p in found]
    assert min(losses) <= LOSS < PAST < max(losses)
    assert 1.0 in scales
    measured.clear()
    again = search(measure, base, [p for p in found if p.scale <= 1])
    assert [p.scale for p in again] == scales
    assert measured == [scale for scale in scales if scale > 1]


def test_a_search_that_loses_nothing_ends():
    found = search(lambda x: point(x, 0.5, 0.95), point(0, 1, 0.95))
    assert 4 < found[-1].scale <= 5


def test_ip_where_a_curve_passes_the_loss():
    ips, losses = np.array([1.0, 0.5, 0.1]), np.array([0.0, 0.01, 0.03])
    assert ip_at_loss(ips, losses) == pytest.approx(0.3)
    assert ip_at_loss(ips, losses, 0.005) == pytest.approx(0.75)
    assert ip_at_loss(ips, losses, 0.5) == 0.1
    assert (passes(losses, 0.02), passes(losses, 0.03)) == (True, False)


@pytest.mark.parametrize(
    ("fidelity", "loss", "at_most"),
    [(0.9, 0.02, (False, False)), (0.925, 0.02, (False, True)), (0.925, 0.03, (True, True))],
)
def test_what_a_curve_ends_too_early_to_say_is_marked(fidelity, loss, at_most):
    """Its fidelity is 95 % without the LoRA; fewer pictures than that at half the strength."""
    points = [point(0.5, 0.6, (0.95 + fidelity) / 2), point(1, 0.2, fidelity)]
    read = ip_with_interval(Curve("x", 4, [point(0, 1, 0.95)], [points]), loss)
    assert (read.at_most, read.low_at_most) == at_most
    assert in_percent(read).count("≤") == sum(at_most)


def test_points_on_disk():
    one = point(0.8, 0.123, 0.9)
    data = json.loads(json.dumps(one.to_json()))
    other = Point.from_json(data)
    assert (data["ip"], other.ip, other.scale) == (0.123, 0.123, 0.8)
    assert (other.faithful == one.faithful).all()
    assert (other.junk == one.junk).all()
    assert other.unsafe_junk.keys() == {"hate"}


def test_contenders_are_methods_with_their_options():
    for contender in CONTENDERS.values():
        check(contender.method, contender.options)


def test_the_shipped_loras_are_what_they_say():
    params = load_pipeline("emoji").unet_params
    files = sorted(LORAS.rglob("*.safetensors"))
    assert lora("hate", 0) in files
    for file in files:
        adapters, header = load_lora(file, params)
        assert header["category"] in (file.stem, "all")
        assert header["base"] == "emoji"
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(adapters))


def test_scaling_counts_what_experts_were_trained_on():
    assert [scaling.concepts(count) for count in (1, 2, 7)] == [6, 11, 40]
    found = {1: Read(0.01, 0, 0.05), 7: Read(0.5, 0.4, 0.6)}
    table = scaling.table({"sum": found, "other": {}})
    assert table.splitlines()[2:] == [
        "| 1 | 6 | 1 % (0 to 5) | - |",
        "| 7 | 40 | 50 % (40 to 60) | - |",
    ]


def test_halves_of_votes_that_agree():
    """Of two outputs one has the same winner by both halves, clearly; the other not, barely."""
    halves = np.array([[[9, 5], [1, 4]], [[8, 4], [2, 5]]], np.float32)  # half, expert, output
    found = agreement(Statistics([], [], {"layer": halves[:, None, None]}, {}, {}))
    assert found == {"outputs": 0.5, "lead": pytest.approx(0.35), "close": 0.0}


def test_same_verdicts():
    one, other = point(1, 0.5, 0.9, 100), point(1, 0.4, 0.9, 100)
    assert (same(one, one), same(one, other)) == (1.0, 0.95)


@pytest.mark.parametrize("split", errors.SPLITS)
def test_prompts_of_the_errors(split):
    prompts, categories = errors.prompts(split, 4)
    assert len(set(prompts)) == len(prompts) == 56
    assert [categories.count(x) for x in (*CATEGORIES, SAFE)] == [4] * 7 + [28]
