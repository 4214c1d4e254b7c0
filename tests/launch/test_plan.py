"""The plan's command line; what it plans is tested in tests/plan."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

from safetydpo_jax import plan
from safetydpo_jax.errors import UserError
from safetydpo_jax.plan.chips import CHIPS
from safetydpo_jax.plan.gpus import GPUS

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
    "bytes_per_chip": {
        "arguments": 2**30,
        "temporaries": 2**29,
        "all": 2**30,
        "memory": 63 * 2**28,
    },
    "cycles": {"convolution": 3e6, "norm": 1e6},
    "cycles_per_pair": 5e5,
    "collectives": [
        {"kind": "all-reduce", "chips": 4, "over_data": True, "count": 2, "bytes": 3e6}
    ],
    "collective_share": 0.01,
    "estimated_step_seconds": 0.0025,
    "estimated_mfu": 0.4,
    "pairs_per_second": 12800.0,
    "weak_scaling": {1: 0.002, 256: 0.003},
    "loops_of_unknown_length": 1,
    "unknown_kernels": {"paged_attention": 3},
    "branches": 2,
    "steps": 500,
    "hours": 0.5,
    "price": 1.2,
    "dollars": 2.4,
    "passes": {
        "programs": {
            name: {
                "bytes_per_chip": {"all": 2**29},
                "bytes_beside": 2**28,
                "unknown_kernels": {"ring": 1} if name == "sampler" else {},
            }
            for name in ("text encoder", "sampler", "decoder", "encoder")
        },
        "drawing": {"fits": True, "pictures_per_second": 2.5},
        "cache": {"fits": False, "remedies": ["--config.dtype=bfloat16"]},
    },
}


@pytest.fixture
def launch(monkeypatch):
    """Runs the script on a plan that is known, and gives back what it asked for."""
    asked = []

    def of_training(config, topology, price, *, passes):
        asked.append((config.batch_size, topology, price, passes))
        return PLAN

    monkeypatch.setattr(plan, "of_training", of_training)

    def launch(*arguments):
        monkeypatch.setattr("sys.argv", ["plan.py", *CONFIG, *arguments])
        runpy.run_path(str(ROOT / "launch" / "plan.py"))["main"]()
        return asked

    launch.asked = asked
    return launch


def test_what_is_said_and_written(launch, tmp_path, capsys):
    files = [f"--json={tmp_path / 'plan.json'}", "--picture", str(tmp_path / "plan.png")]
    asked = launch("--topology", "v5e:2x2", "--config.batch_size=16", *files)
    assert asked == [(16, "v5e:2x2", 1.2, True)]
    said = capsys.readouterr().out
    for words in (
        "with --config.batch_size=32",
        "fits            yes",
        "memory a chip   1.00 of 15.75 GiB: arguments 1.00, temporaries 0.50 (compiled)",
        "convolution        75 %",
        "$2.40 at $1.20 for an hour of a chip (assumed)",
        "all-reduce         2 of 3.0 MB a step, among 4 chips (compiled)",
        "3 calls of the kernel paged_attention are not counted: the step takes longer",
        "1 calls of the kernel ring are not counted: sampler takes longer",
        "drawing         2.50 pictures a second and chip (estimated); 0.75 GiB a chip",
        "cache           does NOT fit; to make it fit: --config.dtype=bfloat16",
        "the step: of 2 choices made at run time the longest way is counted",
        "the step: 1 loops are counted as if they turned once",
    ):
        assert words in said
    assert json.loads((tmp_path / "plan.json").read_text())["estimated_mfu"] == 0.4
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_price_of_ones_own(launch):
    assert launch("--topology=v6e:16x16", "--price=0.5")[0][2] == 0.5


def test_the_step_alone(launch):
    assert launch("--topology=v6e:16x16", "--step-only")[0][3] is False


def test_gpus(tmp_path, monkeypatch, capsys):
    """Of the embedded model: counted, as nothing can be compiled for them here."""
    file = tmp_path / "plan.json"
    files = [f"--json={file}", f"--picture={tmp_path / 'plan.png'}"]
    emoji = f"--config={ROOT / 'configs' / 'hate.py'}"
    told = ["--topology=h100:8", "--mfu=0.5", "--price=2", "--config.dtype=bfloat16"]
    monkeypatch.setattr("sys.argv", ["plan.py", emoji, *told, *files])
    runpy.run_path(str(ROOT / "launch" / "plan.py"))["main"]()
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    assert (found["fits"], found["chips"], found["assumed_mfu"]) == (None, 8, 0.5)
    assert "fits            not known: nothing is compiled" in said
    assert "MFU             50 % of the peak in bfloat16 (assumed" in said
    assert "plan.png: no picture, as nothing was compiled" in said
    seconds = found["estimated_step_seconds"]
    assert seconds == pytest.approx(found["flops_per_chip"] / (0.5 * 989e12))
    assert found["dollars"] == pytest.approx(500 * seconds / 3600 * 8 * 2)


def test_every_chip_has_a_price():
    prices = yaml.safe_load((ROOT / "configs" / "prices.yaml").read_text())
    assert set(prices) == {*CHIPS, *GPUS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology is missing"),
        (["--topology", "v5e:2x2", "--price", "free"], "--price: 'free' is no number of dollars"),
        (["--topology", "v5e:2x2", "--json", "no/such/plan.json"], "there is no such folder"),
        (["--topology", "v5e:2x2", "--json", "{here}"], "could not write .*it is a folder"),
        (["--topology", "v5e:2x2", "--picture", "/proc/plan.png"], "could not write /proc/plan"),
        (["--topology", "v5e:2x2", "--picture", "plan"], "a name that ends in .png"),
        (["--topology", "h100:8", "--mfu", "30"], "--mfu is '30': give a share of the peak"),
        (["--topology", "h100:8", "--mfu", "half"], "--mfu is 'half': give a share of the peak"),
        (["--topology", "v5e:2x2", "--mfu", "0.5"], "--mfu is for GPUs: a step on v5e:2x2 is"),
    ],
)
def test_wrong_commands(launch, arguments, message, tmp_path):
    """Each is told before anything is compiled."""
    with pytest.raises(UserError, match=message):
        launch(*(argument.format(here=tmp_path) for argument in arguments))
    assert not launch.asked


def test_no_picture_of_what_does_not_fit(launch, tmp_path, monkeypatch, capsys):
    sizes = {"all": 2**40, "memory": 2**34}
    no_place = PLAN | {"fits": False, "bytes_per_chip": sizes, "remedies": ["--config.remat=true"]}
    monkeypatch.setattr(plan, "of_training", lambda *_, passes: no_place)
    launch("--topology", "v5e:2x2", "--picture", str(tmp_path / "plan.png"))
    assert "plan.png: no picture, as it does not fit" in capsys.readouterr().out
