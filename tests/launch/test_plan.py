"""The plan's command line; what it plans is tested in tests/plan."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

from safetydpo_jax import plan
from safetydpo_jax.errors import UserError
from safetydpo_jax.plan.chips import CHIPS

# ml_collections' own, of how it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", str(ROOT / "configs" / "hate.py")]
PLAN = {
    "config": "hate:emoji",
    "chip": "v5e",
    "chips": 4,
    "pairs": 32,
    "changed": "--config.batch_size=32",
    "fits": True,
    "flops_per_chip": 2e12,
    "bytes_per_chip": {"arguments": 2**30, "temporaries": 2**29, "all": 2**30, "memory": 2**34},
    "cycles": {"convolution": 3e6, "norm": 1e6},
    "cycles_per_pair": 5e5,
    "collectives": {"all-reduce": {"count": 2, "bytes": 3e6}},
    "collective_share": 0.01,
    "estimated_step_seconds": 0.0025,
    "estimated_mfu": 0.4,
    "pairs_per_second": 12800.0,
    "weak_scaling": {1: 0.002, 256: 0.003},
    "loops_of_unknown_length": 1,
    "collectives_partial": True,
    "steps": 500,
    "hours": 0.5,
    "price": 1.2,
    "dollars": 2.4,
}


@pytest.fixture
def launch(monkeypatch):
    """Runs the script on a plan that is known, and gives back what it asked for."""
    asked = []

    def of_training(config, topology, price):
        asked.append((config.batch_size, topology, price))
        return PLAN

    monkeypatch.setattr(plan, "of_training", of_training)

    def launch(*arguments):
        monkeypatch.setattr("sys.argv", ["plan.py", *CONFIG, *arguments])
        runpy.run_path(str(ROOT / "launch" / "plan.py"))["main"]()
        return asked[-1]

    return launch


def test_what_is_said_and_written(launch, tmp_path, capsys):
    files = [f"--json={tmp_path / 'plan.json'}", "--picture", str(tmp_path / "plan.png")]
    asked = launch("--topology", "v5e:2x2", "--config.batch_size=16", *files)
    assert asked == (16, "v5e:2x2", 1.2)
    said = capsys.readouterr().out
    for words in (
        "with --config.batch_size=32",
        "fits            yes",
        "memory a chip   1.00 of 16 GiB: arguments 1.00, temporaries 0.50 (compiled)",
        "convolution        75 %",
        "$2.40 at $1.20 for an hour of a chip (assumed)",
        "what fsdp and tensor axes send is not all counted",
        "1 loops are counted as if they turned once",
    ):
        assert words in said
    assert json.loads((tmp_path / "plan.json").read_text())["estimated_mfu"] == 0.4
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_price_of_ones_own(launch):
    assert launch("--topology=v6e:16x16", "--price=0.5")[2] == 0.5


def test_every_chip_has_a_price():
    prices = yaml.safe_load((ROOT / "configs" / "prices.yaml").read_text())
    assert set(prices) == set(CHIPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology is missing"),
        (["--topology", "v5e:2x2", "--price", "free"], "--price: 'free' is no number of dollars"),
        (["--topology", "v5e:2x2", "--json", "no/such/plan.json"], "there is no such folder"),
    ],
)
def test_wrong_commands(launch, arguments, message):
    with pytest.raises(UserError, match=message):
        launch(*arguments)
