import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import train_detector
from safetydpo_jax.emoji import detector, scenes
from safetydpo_jax.emoji.concepts import CONCEPTS, INDEX, NONE
from safetydpo_jax.emoji.junk import JUNK, degrade
from safetydpo_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def shipped():
    return detector.Detector.load()


def test_names_what_fresh_scenes_show(shipped):
    rng = np.random.default_rng(20)
    drawn = [scenes.sample_scene(rng, "held_out") for _ in range(192)]
    for pictures in (
        np.stack([scenes.render(s) for s in drawn]),
        np.stack([degrade(scenes.render(s), rng) for s in drawn]),
    ):
        right = [
            named == frozenset(s.concepts)
            for named, s in zip(shipped.names(pictures), drawn, strict=True)
        ]
        assert np.mean(right) >= 0.95


@pytest.mark.parametrize("kind", JUNK)
def test_names_nothing_in_junk(shipped, kind):
    rng = np.random.default_rng(21)
    pictures = np.stack([JUNK[kind](rng) for _ in range(64)])
    assert pictures.shape == (64, 64, 64, 3)
    # A crossfade is half of one pictogram and half of another: the hardest, and the least like what
    # a diffusion model draws.
    least = 0.8 if kind == "crossfade" else 0.9
    assert np.mean([not names for names in shipped.names(pictures)]) >= least


def test_shipped_numbers():
    measured = json.loads(detector.WEIGHTS.with_suffix(".json").read_text())
    clean = [v for k, v in measured["held_out_exact"].items() if k.startswith("clean")]
    assert min(clean) >= 0.98
    assert measured["junk_named_none"].keys() == JUNK.keys()
    hardest = measured["junk_named_none"].pop("crossfade")
    assert hardest >= 0.85
    assert min(measured["junk_named_none"].values()) >= 0.95
    assert detector.WEIGHTS.stat().st_size < 2 * 2**20


def test_any_number_of_pictures(shipped):
    rng = np.random.default_rng(22)
    pictures = np.stack([scenes.render(scenes.sample_scene(rng)) for _ in range(70)])
    all_of_them = shipped.probabilities(pictures)
    assert all_of_them.shape == (70, len(CONCEPTS))
    one = shipped.probabilities(pictures[66:67])
    np.testing.assert_allclose(one, all_of_them[66:67], atol=1e-5)
    assert shipped.names(pictures[:0]) == []


def test_two_names_at_most():
    probabilities = np.zeros(len(CONCEPTS), np.float32)
    probabilities[[3, 7, 9]] = 0.6, 0.9, 0.8
    assert detector.name_concepts(probabilities) == {CONCEPTS[7].name, CONCEPTS[9].name}
    probabilities[9] = 0.49
    assert detector.name_concepts(probabilities) == {CONCEPTS[7].name, CONCEPTS[3].name}
    assert detector.name_concepts(0 * probabilities) == frozenset()


def test_folding_keeps_the_function():
    """With a batch's own statistics as averages, the folded network gives what training gave."""
    net = detector.DetectorNet(training=True)
    pixels = jax.random.uniform(jax.random.key(1), (8, 64, 64, 3), minval=-1)
    variables = jax.jit(net.init)(jax.random.key(0), pixels)
    expected, moved = jax.jit(lambda v, x: net.apply(v, x, mutable=["batch_stats"]))(
        variables, pixels
    )
    statistics = jax.tree.map(
        lambda new, old: (new - 0.99 * old) / 0.01, moved["batch_stats"], variables["batch_stats"]
    )
    folded = detector.fold_norms({"params": variables["params"], "batch_stats": statistics})
    found = jax.jit(detector.DetectorNet().apply)({"params": folded}, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-3 * float(jnp.abs(expected).max()))


def test_save_and_load(tmp_path, shipped):
    detector.save_params(shipped.params, tmp_path / "copy.safetensors")
    again = detector.load_params(tmp_path / "copy.safetensors")
    for one, other in zip(jax.tree.leaves(shipped.params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_files(tmp_path, shipped):
    path = tmp_path / "detector.safetensors"
    with pytest.raises(FileNotFoundError, match=r"weights are missing.*train_detector"):
        detector.load_params(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        detector.load_params(path)
    flat = load_file(detector.WEIGHTS)
    save_file(flat, path, {"concepts": "others"})
    with pytest.raises(UserError, match="trained for other concepts"):
        detector.load_params(path)
    del flat["concepts.bias"]
    save_file(flat, path, {"concepts": detector.concept_digest()})
    with pytest.raises(UserError, match="parameters are not those of DetectorNet"):
        detector.load_params(path)


def test_pictures_of_another_size(shipped):
    with pytest.raises(UserError, match=r"64x64 RGB pictures, not \(32, 32, 3\)"):
        shipped.names(np.zeros((1, 32, 32, 3), np.uint8))


def test_labels():
    one = scenes.Placement(20, 40, 30, 0)
    allowed = train_detector.label(scenes.Scene(("bell",), ("red",), "small", (one,), None))
    bell = INDEX["bell"]
    assert set(np.flatnonzero(allowed[2, 1])) == {bell}
    assert set(np.flatnonzero(allowed[1, 0])) == {bell, NONE}
    assert set(np.flatnonzero(allowed[0, 1])) == {NONE}
    assert allowed.sum() == 16 + 8
    assert train_detector.label(None)[..., NONE].all()
    assert train_detector.label(None).sum() == 16


def test_training_pictures_are_a_stream():
    pictures, labels = train_detector.training_batch(0, 2, 4)
    again, label = train_detector.training_picture(0, 9)
    np.testing.assert_array_equal(pictures[1], again)
    np.testing.assert_array_equal(labels[1], label)


def test_training_resumes(tmp_path, monkeypatch, capsys):
    def train(workdir, steps):
        out = tmp_path / workdir / "detector.safetensors"
        arguments = ["--steps", str(steps), "--batch", "8", "--measure", "4"]
        paths = ["--workdir", str(tmp_path / workdir), "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["train_detector.py", *arguments, *paths])
        train_detector.main()
        return load_file(out)

    first = train("a", 6)
    assert "wrote" in capsys.readouterr().out
    again = train("a", 6)  # from the last snapshot: nothing is left to do
    assert "going on from step 6" in capsys.readouterr().out
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    with pytest.raises(UserError, match="snapshot of another run"):
        train("a", 7)
    with pytest.raises(UserError, match="must be above 0"):
        train("b", 0)
