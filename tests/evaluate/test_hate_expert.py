"""The benchmark on a tiny random checkpoint: pooling, resume, and PyTorch beside ours."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from safetydpo_jax.emoji.concepts import CATEGORY_OF, HARMS
from safetydpo_jax.errors import MissingFileError
from safetydpo_jax.lora import init_adapters, save_lora
from safetydpo_jax.models.pretrained import load_pipeline
from tests.diffusion.tiny_pipeline import write_tiny_pipeline

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "hate_expert.py"


class ColourJudge:
    """Names that follow from a picture's mean colour, so that random pictures have outcomes."""

    name = "colour"
    unsafe_names = frozenset(CATEGORY_OF)

    def __call__(self, pictures):
        pair = HARMS["hate"].concepts[0]
        red, green, blue = np.moveaxis(pictures.mean((1, 2)), 1, 0)
        return [
            frozenset({pair.unsafe} if r > g else {pair.safe} if g > b else set())
            for r, g, b in zip(red, green, blue, strict=True)
        ]

    def backgrounds(self, pictures):
        return [frozenset({"red"})] * len(pictures)


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("hate_expert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    checkpoint = write_tiny_pipeline(tmp_path / "checkpoint")
    config = module.load_config("hate")
    config.model = str(checkpoint)
    config.drawing.num_steps, config.drawing.batch_size = 2, 8
    monkeypatch.setattr(
        module, "load_config", lambda category: config.copy_and_resolve_references()
    )
    monkeypatch.setattr(module, "EmojiJudge", ColourJudge)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    return module


def export(benchmark, workdir, seed):
    params = load_pipeline(benchmark.load_config("hate").model).unet_params
    fresh = init_adapters(jax.random.key(seed), params, rank=2, targets=["to_q", "to_out.0"])
    (workdir / "export").mkdir(parents=True, exist_ok=True)
    adapters = jax.tree.map(lambda leaf: leaf + 0.5, fresh)
    save_lora(workdir / "export" / "pytorch_lora_weights.safetensors", adapters, alpha=2.0)


# diffusers' own DPM-Solver hands a torch tensor to numpy.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_trains_evaluates_pools_and_compares(benchmark, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    trained = []

    def run(config, workdir):
        trained.append(config.seed)
        assert not config.report.enabled
        export(benchmark, workdir, config.seed)

    monkeypatch.setattr(benchmark.loop, "run", run)
    command = ["--runs", str(tmp_path / "runs"), "--seeds", "0", "5", "--torch"]
    command += ["--num-unsafe", "8", "--num-safe", "8"]
    benchmark.main(command)
    path = tmp_path / "benchmarks" / "results" / "hate_expert.json"
    result = json.loads(path.read_text())
    assert trained == [0, 5]
    assert result["pooled"]["num_unsafe"] == result["pooled"]["num_safe"] == 16
    assert len(result["runs"]) == 2
    assert set(result["bars"]) == {
        "ip_fall", "fidelity_change", "junk_change", "unsafe_junk_change"
    }  # fmt: skip
    assert result["torch"]["num_unsafe"] == 16
    assert result["torch"]["same_outcome"] > 0.9  # same file, same latents: the same pictures
    said = capsys.readouterr().out
    assert "2 runs pooled" in said
    assert "PyTorch's pipeline" in said

    monkeypatch.setattr(benchmark, "torch_drawer", lambda *args: pytest.fail)
    benchmark.main(command)  # nothing is drawn again; finished runs are opened and checked
    assert trained == [0, 5, 0, 5]
    assert json.loads(path.read_text())["pooled"] == result["pooled"]
    assert "from disk" in capsys.readouterr().out


def test_unfinished_runs_are_named(benchmark, tmp_path):
    with pytest.raises(MissingFileError, match="finish the run in"):
        benchmark.main(["--workdirs", str(tmp_path / "nothing"), "--runs", str(tmp_path)])


def test_recorded_figures(benchmark):
    """What the README's table says, and the bars it meets; the file is written by the benchmark."""
    recorded = json.loads((SCRIPT.parent / "results" / "hate_expert.json").read_text())
    pooled = recorded["pooled"]
    assert pooled["num_unsafe"] >= 384
    assert pooled["num_safe"] >= 1000
    assert len(recorded["runs"]) == 3
    assert all(benchmark.met(pooled, name) for name in benchmark.BARS)
    assert recorded["torch"]["within_interval"]
    low, high = pooled["ip_fall_interval"]
    fall = f"by {100 * pooled['ip_fall']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    assert fall in (SCRIPT.parents[1] / "README.md").read_text()
