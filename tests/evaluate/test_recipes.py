"""The comparison of recipes: every point can be trained, and what the table and the plot show."""

import importlib.util
import json
import types
from pathlib import Path

import pytest

from configs import hate
from safetydpo_jax.errors import UserError
from safetydpo_jax.train.settings import resolve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipes():
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "benchmarks" / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_point_is_a_config_of_its_own(recipes):
    assert len(recipes.POINTS) == sum(len(points) for _, points in recipes.CURVES.values())
    seen = set()
    for changes in recipes.POINTS.values():
        config = hate.get_config()
        config.update_from_flattened_dict(changes)
        resolved = resolve(config).to_json()
        assert resolved not in seen  # a point that repeats another, the default among them
        seen.add(resolved)


def result(ip, fidelity_change):
    summary = {
        "ip_before": 0.95,
        "ip_after": ip,
        "counterpart_after": 0.5,
        "unsafe_junk_after": 0.1,
        "fidelity_before": 0.9,
        "fidelity_after": 0.9 + fidelity_change,
        "fidelity_change": fidelity_change,
        "junk_change": 0.01,
    }
    last = {"implicit_accuracy": 1.0, "winner_error": -0.1, "loser_error": 0.2}
    return {"tune": summary, "test": summary, "last": last, "residual": 0.123, "drift": 0.0021}


def test_table_and_plot(recipes, tmp_path):
    pytest.importorskip("matplotlib")
    results = {name: result(i / 100, -i / 1000) for i, name in enumerate(recipes.POINTS)}
    text = recipes.table(results)
    row = "| anchored | 0.0 | 50.0 | 10.0 | +0.0 | +1.0 | 0.123 | 2.10 | 1.00 | -0.100 | +0.200 |"
    assert row in text.splitlines()
    assert len(text.splitlines()) == 2 + len(recipes.CURVES) + len(recipes.POINTS)
    assert all(line.count("|") == 12 for line in text.splitlines())
    recipes.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000


def test_missing_points_run_each_in_its_own_process(recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "RESULTS", tmp_path)
    started = []

    def write(name, **changes):
        settings = recipes.settings_of(name) | changes
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": settings}))

    def run(command, **options):
        name = command[command.index("--only") + 1]
        started.append(name)
        write(name)
        for folder in ("pairs", "cache"):
            (tmp_path / "runs" / "anchored" / folder).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(returncode=failing)

    failing = 0
    monkeypatch.setattr(recipes.subprocess, "run", run)
    write("rank-2")
    write("rank-8", num_safe=1)  # of other settings: it does not count
    recipes.run_missing(tmp_path / "runs", jobs=2)
    assert started[0] == "anchored"  # it makes the pairs of all
    assert sorted(started) == sorted(recipes.POINTS.keys() - {"rank-2"})
    assert "0 s left" in capsys.readouterr().out.splitlines()[-1]
    recipes.run_missing(tmp_path / "runs", jobs=2)
    assert len(started) == len(recipes.POINTS) - 1

    # With the results but without the pairs: the first has to make them again.
    started.clear()
    (tmp_path / "beta-5.json").unlink()
    recipes.run_missing(tmp_path / "elsewhere", jobs=2)
    assert started == ["anchored", "beta-5"]

    failing = 1
    (tmp_path / "beta-5.json").unlink()
    with pytest.raises(UserError, match="beta-5 failed; its last words are in .*log"):
        recipes.run_missing(tmp_path / "runs", jobs=1)
    with pytest.raises(UserError, match="--jobs is 0"):
        recipes.run_missing(tmp_path / "runs", jobs=0)


def test_a_finished_point_counts_while_its_settings_hold(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RESULTS", tmp_path)
    assert not recipes.is_done("beta-5")
    settings = recipes.settings_of("beta-5")
    (tmp_path / "beta-5.json").write_text(json.dumps({"settings": settings}))
    assert recipes.is_done("beta-5")
    del settings["config"]["lora"]["init"]  # as written before that setting came
    (tmp_path / "beta-5.json").write_text(json.dumps({"settings": settings}))
    assert recipes.is_done("beta-5")
    settings["config"]["loss"]["beta"] = 6.0
    (tmp_path / "beta-5.json").write_text(json.dumps({"settings": settings}))
    assert not recipes.is_done("beta-5")
