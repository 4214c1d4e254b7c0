"""Pretraining at a tiny size: pictures in, a checkpoint out, resumed as if never cut."""

import csv

import jax
import numpy as np
import pytest
from PIL import Image

from configs.emoji_base import get_config
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.pretrain.pictures import prepare_pictures
from safetydpo_jax.pretrain.run import run


def tiny_config(source):
    config = get_config()
    config.data.update({"source": str(source), "resolution": 16})
    config.vae.update(
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
        }
    )
    config.text_encoder.update({"hidden_size": 16, "intermediate_size": 32})
    config.unet.update(
        {
            "block_out_channels": (16, 16),
            "cross_attention_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
        }
    )
    for training in (config.autoencoder_training, config.denoiser_training):
        training.update(
            {
                "steps": 4,
                "batch_size": 4,
                "warmup_steps": 1,
                "decay_steps": 1,
                "log_every": 2,
                "save_every": 2,
            }
        )
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for i in range(300):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", f"number {i % 7}"])
    return folder


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_checkpoint(folder, tmp_path, capsys):
    made = run(tiny_config(folder), tmp_path)
    assert "done in" in capsys.readouterr().out
    pipeline = load_pipeline(made)
    assert pipeline.resolution == 16
    assert pipeline.encode_prompts(["number 3"]).prompt_embeds.shape == (1, 24, 16)
    mean, _ = pipeline.encode_images(np.load(tmp_path / "pictures" / "pictures.npy")[:64])
    assert 0.3 < mean.std() < 3.0  # latents are scaled to about one
    begun = tiny_config(folder)
    begun.init.path = str(made)
    begun.denoiser_training.update({"learning_rate": 0.0, "weight_decay": 0.0})
    begun.scheduler.prediction_type = "epsilon"  # of a UNet of ours alone
    same = load_pipeline(run(begun, tmp_path / "begun"))
    assert same.schedule.prediction_type == "v_prediction"
    assert same.vae.config.scaling_factor == pipeline.vae.config.scaling_factor
    assert not (tmp_path / "begun" / "autoencoder").exists()
    for ours, theirs in (
        (same.vae_params, pipeline.vae_params),
        (same.text_params, pipeline.text_params),
        (same.unet_params, pipeline.unet_params),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    changed = tiny_config(folder)
    changed.denoiser_training.learning_rate = 5e-4
    with pytest.raises(UserError, match="denoiser_training.learning_rate = 0.002, but now"):
        run(changed, tmp_path)
    longer = tiny_config(folder)
    longer.autoencoder_training.steps = 6  # so that its latents are others
    with pytest.raises(UserError, match="autoencoder_weights = .*, but now"):
        run(longer, tmp_path)


def test_other_settings_are_refused(folder, tmp_path):
    config = tiny_config(folder)
    prepare_pictures(config.data, tmp_path)
    (tmp_path / "pictures" / "settings.json").write_text('{"data.resolution": 32}')
    with pytest.raises(UserError, match="data.count = None, but now it is 60000: set it back"):
        run(config, tmp_path)


def test_pictures_are_cropped_to_squares(folder, tmp_path, capsys):
    config = tiny_config(folder).data
    pictures, captions = prepare_pictures(config, tmp_path / "all")
    assert pictures.shape == (300, 16, 16, 3)
    assert captions[8] == "number 1"
    config.count = 290
    few, captions = prepare_pictures(config, tmp_path / "few")
    assert "data.count leaves out the last 10 of 300" in capsys.readouterr().out
    assert len(captions) == 290
    np.testing.assert_array_equal(few, pictures[:290])


def test_photos_that_lie_on_their_side_are_turned(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # above, but the file says that it is to be turned by a quarter
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    pictures, _ = prepare_pictures(tiny_config(tmp_path).data, tmp_path / "work")
    assert pictures[0, :, 8:].min() == 255
    assert pictures[0, :, :8].max() == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.resolution", 15, "data.resolution is 15: it must be a multiple of"),
        ("denoiser_training.steps", 1, "steps must be as many as both"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_trained(folder, tmp_path, key, value, message):
    config = tiny_config(folder)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "work")
    assert not (tmp_path / "work" / "pictures").exists()


def test_the_embedded_world_has_one_resolution(tmp_path):
    with pytest.raises(UserError, match="data.resolution is 16: .* have 64 px"):
        prepare_pictures(tiny_config("emoji").data, tmp_path)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (None, MissingFileError, "metadata.csv: missing"),
        ("name,text\na.png,x\n", UserError, "columns file_name,text"),
        ("file_name,text\n../a.png,x\n", UserError, "outside the folder"),
        ("file_name,text\nnone.png,x\n", MissingFileError, "none.png: named in metadata.csv"),
        ("file_name,text\nbad.png,x\n", UserError, "bad.png: not a readable picture"),
    ],
)
def test_bad_folders_are_told_plainly(tmp_path, table, error, message):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG broken")
    if table is not None:
        (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(error, match=message):
        prepare_pictures(tiny_config(tmp_path).data, tmp_path / "work")
