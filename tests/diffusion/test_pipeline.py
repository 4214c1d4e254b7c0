"""A tiny random checkpoint drawn by launch/sample.py, by draw_pictures and by PyTorch diffusers."""

import jax
import numpy as np
import pytest
from PIL import Image

from launch import sample
from safetydpo_jax.diffusion import draw_pictures, initial_latents
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora import init_adapters, save_lora, scaled

PROMPTS = ["a red dog", "", "two cats"]
SEEDS = [4, 5, 9]
OPTIONS = {"num_steps": 6, "guidance_scale": 5.0, "negative_prompt": "dog"}


@pytest.fixture(scope="module")
def adapters(pipeline):
    fresh = init_adapters(jax.random.key(0), pipeline.unet_params, rank=2, targets=["to_q", "to_v"])
    return jax.tree.map(lambda leaf: leaf + 0.5, fresh)


def test_pictures_equal_pytorch_diffusers(model_folder, pipeline):
    torch = pytest.importorskip("torch")
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model_folder)
    theirs.set_progress_bar_config(disable=True)
    noise = np.asarray(initial_latents(SEEDS, pipeline.latent_shape)).transpose(0, 3, 1, 2)
    wanted = theirs(
        PROMPTS,
        latents=torch.from_numpy(noise.copy()),
        num_inference_steps=OPTIONS["num_steps"],
        guidance_scale=OPTIONS["guidance_scale"],
        negative_prompt=[OPTIONS["negative_prompt"]] * len(PROMPTS),
        output_type="np",
    ).images
    pictures = draw_pictures(pipeline, PROMPTS, SEEDS, **OPTIONS)
    assert pictures.std() > 10
    assert np.abs(pictures - wanted * 255).mean() < 0.5


def test_command_line_draws_what_draw_pictures_draws(
    model_folder, pipeline, adapters, tmp_path, capsys
):
    save_lora(tmp_path / "lora.safetensors", scaled(adapters, 1.0, 2))
    table = tmp_path / "prompts.csv"
    rows = zip(PROMPTS, SEEDS, strict=True)
    lines = [f"{prompt},{i}.png,{seed}" for i, (prompt, seed) in enumerate(rows)]
    table.write_text("\n".join(["prompt,image,seed", *lines]))
    command = ["--model", str(model_folder), "--prompts", str(table), "--steps", "6"]
    command += ["--lora", str(tmp_path / "lora.safetensors")]
    command += ["--guidance_scale", "5", "--negative_prompt", "dog"]
    for scale in ("1", "0"):
        out = tmp_path / scale
        sample.main([*command, "--out", str(out), "--scale", scale, "--grid"])
        drawn = np.stack([np.asarray(Image.open(out / f"{i}.png")) for i in range(3)])
        applied = scaled(adapters, alpha=float(scale), rank=2)
        wanted = draw_pictures(pipeline, PROMPTS, SEEDS, adapters=applied, **OPTIONS)
        assert np.abs(drawn.astype(int) - wanted).max() <= 1
    assert np.asarray(Image.open(out / "grid.png")).shape == (16, 48, 3)
    base = draw_pictures(pipeline, PROMPTS, SEEDS, **OPTIONS)
    adapted = np.asarray(Image.open(tmp_path / "1" / "0.png")).astype(int)
    assert np.abs(drawn.astype(int) - base).max() <= 1
    assert np.abs(adapted - base[0]).mean() > 1
    said = capsys.readouterr().out
    assert "3/3 pictures" in said
    assert said.endswith(f"3 pictures are in {out}\n")
    assert not any(prompt in said for prompt in PROMPTS if prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "no such folder"),
        (["--steps", "2000"], "num_steps is 2000"),
        (["--lora", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_bad_options(model_folder, tmp_path, options, message):
    command = ["--model", str(model_folder), "--prompt", "dog", "--out", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        sample.main([*command, *options])


@pytest.mark.parametrize("name", ["--steps", "--batch_size"])
def test_nothing_is_loaded_for_no_steps_or_rows(tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        sample.main(["--model", "gone", "--prompt", "dog", "--out", str(tmp_path), name, "0"])
    assert f"{name} 0: it must be 1 or more" in capsys.readouterr().err


def test_devices_share_the_rows(pipeline):
    several = pipeline.spread(jax.local_devices()[:4])
    assert several.num_devices == 4
    assert pipeline.spread(jax.local_devices()[:1]) is pipeline
    many, seeds = PROMPTS * 2, [*SEEDS, 1, 2, 3]
    one = draw_pictures(pipeline, many, seeds, batch_size=1, **OPTIONS)
    # Two batches of four pictures, of which the last is there three times.
    other = draw_pictures(several, many, seeds, batch_size=1, **OPTIONS)
    assert np.abs(one.astype(int) - other).max() <= 1  # rounding
    for a, b in zip(pipeline.encode_images(one), several.encode_images(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    a, b = (x.encode_prompts(many).prompt_embeds for x in (pipeline, several))
    np.testing.assert_allclose(a, b, atol=1e-5)
