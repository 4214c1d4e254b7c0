"""What comes before the steps: its programs, and how their rates follow from their cycles."""

import importlib.util

import jax
import pytest

from configs import hate
from safetydpo_jax import plan, sharding
from safetydpo_jax.plan import passes
from safetydpo_jax.plan.chips import CHIPS
from safetydpo_jax.plan.programs import Planned
from safetydpo_jax.train.settings import resolve
from tests.diffusion.tiny_pipeline import write_tiny_pipeline

pytestmark = pytest.mark.usefixtures("optimised")

CHIP = CHIPS["v5e"]
GIB = 2**30


def planned(model, base="sd15", mesh=(8, 1, 1), **changes):
    config = hate.get_config(base)
    config.model, config.pairs.path, config.batch_size = str(model), ".", 8
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return Planned(resolve(config), config.model, sharding.make_mesh(*mesh))


def size(*trees):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_every_chip_runs_its_own_rows(base, tmp_path):
    """As many as generate.py and the cache's pass give a device; nothing is exchanged."""
    run = planned(write_tiny_pipeline(tmp_path / base, base), base, drawing__batch_size=3)
    made, params = passes.Passes(run), run.pipeline.params
    h, w, c = run.pipeline.latent_shape
    side = run.pipeline.resolution
    text, unet, vae = run.pipeline.text_params, params["unet"], params["vae"]
    for program, rows, beside, row in (
        (made.text_encoder(), 64, size(unet, vae), "x12xi32"),
        (made.sampler(), 3, size(text, vae), f"x{h}x{w}x{c}xf32"),
        # The pictures of all chips come to each as a batch: it is filled up.
        (made.decoder(), 24, size(text, unet), f"x{h}x{w}x{c}xf32"),
        (made.encoder(), 32, size(text, unet), f"x{side}x{side}x3xui8"),
    ):
        assert (program.rows, program.beside) == (rows, beside)
        lowered = program.lowered.as_text()
        assert f"tensor<{8 * rows}{row}>" in lowered  # of all chips
        assert f"tensor<{rows}{row}>" in lowered  # of one
        assert "all_" not in lowered
        assert "collective_permute" not in lowered


def test_weights_that_a_step_has_in_parts(model_folder):
    """A chip draws with all of them; of the UNet, while others work, it has its own."""
    whole = passes.Passes(planned(model_folder))
    parts = passes.Passes(planned(model_folder, mesh=(2, 2, 2)))
    assert parts.encoder().beside < whole.encoder().beside
    assert parts.sampler().beside == whole.sampler().beside


def test_pictures_are_encoded_as_large_as_the_cache_wants_them(model_folder):
    run = planned(model_folder, cache__resolution=512)
    program = passes.Passes(run).encoder()
    assert program.rows == 8
    assert "tensor<64x512x512x3xui8>" in program.lowered.as_text()


@pytest.fixture
def compiled(monkeypatch):
    """Has each program, in this order, so many cycles and bytes."""
    found = {
        "text encoder": (64 * 1.5e6, GIB),
        "sampler": (3 * 1.5e9, 2 * GIB),
        "decoder": (3 * 3e8, 2 * GIB),
        "encoder": (32 * 1.5e8, GIB),
    }

    def compiled_for(program, topology, chip, progress):
        cycles, size = next(values)
        sizes = {"all": size, "memory": chip.memory}
        return {"bytes_per_chip": sizes} | ({"cycles": {"other": cycles}} if cycles else {})

    monkeypatch.setattr(passes, "compiled_for", compiled_for)
    values = iter(found.values())
    return found


def test_a_picture_goes_through_each_program(compiled, model_folder):
    run = planned(model_folder, drawing__batch_size=3, cache__flip=True)
    found = passes.of_passes(run, "v5e:2x2", CHIP, lambda line: None)
    assert found["programs"]["sampler"]["estimated_seconds"] == pytest.approx(3)
    assert found["drawing"] == {
        "fits": True,
        "pictures_per_second": pytest.approx(3 / (0.064 + 3 + 0.6)),
    }
    # Of 128 pictures 16 on each of 8 chips, their mirror images, and one text each.
    assert found["cache"]["pictures_per_second"] == pytest.approx(16 / (0.064 + 2 * 3.2))


@pytest.mark.parametrize("cycles", [1.5e9, None])  # the compiler may say it, or what is beside it
def test_what_does_not_fit(compiled, model_folder, cycles):
    compiled["sampler"] = (cycles, CHIP.memory)
    run = planned(model_folder, drawing__batch_size=6)
    found = passes.of_passes(run, "v5e:2x2", CHIP, lambda line: None)
    remedies = ["--config.dtype=bfloat16", "--config.drawing.batch_size=3"]
    assert found["drawing"] == {"fits": False, "remedies": remedies}
    assert found["cache"]["fits"]


def test_nothing_to_change_but_the_slice(model_folder):
    run = planned(model_folder, dtype="bfloat16")
    assert passes._remedies(run.config, ["encoder"]) == ["a slice whose chips have more memory"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: pip install 'safetydpo-jax[tpu]'",
)
def test_compiled(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = hate.get_config("sd15")
    config.model, config.dtype, config.batch_size = str(model_folder), "bfloat16", 8
    found = plan.of_training(config, "v5e:2x2")
    for program in found["passes"]["programs"].values():
        assert program["fits"]
        assert program["collectives"] == []
        assert program["unknown_kernels"] == {}
        assert program["loops_of_unknown_length"] == 0
    text = "\n".join(plan.lines(found))
    rate = found["passes"]["cache"]["pictures_per_second"]
    assert f"cache           {rate:.2f} pictures a second and chip, {4 * rate:.0f} in all" in text
    rate = found["passes"]["drawing"]["pictures_per_second"]
    assert f"drawing         {rate:.2f} pictures a second and chip (estimated)" in text
