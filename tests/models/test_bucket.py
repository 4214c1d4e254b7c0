"""Checkpoints in a bucket, behind a server that speaks Google Cloud Storage's protocol."""

import threading

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models import bucket as buckets
from safetydpo_jax.models.checkpoint import open_checkpoint, resolve_checkpoint, resolve_vae
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.remote import cache_home
from tests.models.test_single_file import in_original_layout


@pytest.fixture
def model(bucket, model_folder):
    """A checkpoint in the bucket, with files beside it that nothing reads."""
    for file in model_folder.rglob("*"):
        if file.is_file():
            (bucket / "tiny" / file.relative_to(model_folder).as_posix()).write_bytes(
                file.read_bytes()
            )
    for name in ("README.md", "unet/diffusion_pytorch_model.bin", "safety_checker/config.json"):
        (bucket / "tiny" / name).write_bytes(b"{}")
    return bucket / "tiny"


def same(found, pipeline):
    jax.tree.map(np.testing.assert_array_equal, found.params, pipeline.params)


def test_a_folder_is_fetched_once(model, pipeline, capsys):
    for _ in range(2):
        found = load_pipeline(str(model))
        same(found, pipeline)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith(f"{model}: fetching 1 files")] == said[:1]
    assert len(said) == 3  # the index, other small files, the weights
    names = {file.relative_to(found.path).as_posix() for file in found.path.rglob("*.*")}
    assert "unet/diffusion_pytorch_model.safetensors" in names
    assert not names & {"README.md", "unet/diffusion_pytorch_model.bin"}
    assert not (found.path / "safety_checker").exists()


def test_a_single_file(bucket, model_folder, pipeline, tmp_path):
    file = tmp_path / "tiny.safetensors"
    save_file(in_original_layout(model_folder, pipeline.params, "sd15"), file)
    (bucket / "models" / "tiny.safetensors").write_bytes(file.read_bytes())
    address = str(bucket / "models" / "tiny.safetensors")
    assert resolve_checkpoint(address).read_bytes() == file.read_bytes()
    same(load_pipeline(address, configs=str(model_folder)), pipeline)


def test_another_autoencoder(bucket, model_folder):
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (bucket / "vae" / name).write_bytes((model_folder / "vae" / name).read_bytes())
    folder = resolve_vae(str(bucket / "vae"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert weights.read_bytes() == (model_folder / "vae" / weights.name).read_bytes()
    assert resolve_vae(str(bucket / "vae" / weights.name)).read_bytes() == weights.read_bytes()


def test_the_autoencoder_of_a_checkpoint(model):
    assert not (resolve_vae(str(model)) / "model_index.json").exists()


def test_a_file_that_was_replaced(model, capsys):
    folder = resolve_checkpoint(str(model))
    assert (model / "vae" / "config.json").stat().mtime > 0
    (model / "vae" / "config.json").write_bytes(b"{}")
    capsys.readouterr()
    assert resolve_checkpoint(str(model)) == folder
    assert (folder / "vae" / "config.json").read_bytes() == b"{}"
    assert "fetching 1 files, 0.0 MB: done" in capsys.readouterr().out


def test_goes_on_where_it_was_killed(model, monkeypatch, capsys):
    whole, arrived, some = buckets.download, [], threading.Event()

    def killed(there, here, copied):
        if there.name == "vocab.json":
            assert some.wait(60)  # for one beside it, which is then not to be fetched again
            raise KeyboardInterrupt
        answer = whole(there, here, copied)
        arrived.append(there)
        if there.name != "model_index.json":
            some.set()
        return answer

    monkeypatch.setattr(buckets, "download", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve_checkpoint(str(model))
    fetched = []
    monkeypatch.setattr(
        buckets, "download", lambda there, *rest: fetched.append(there) or whole(there, *rest)
    )
    resolve_checkpoint(str(model))
    assert "vocab.json" in {there.name for there in fetched}
    assert not set(map(str, arrived)) & set(map(str, fetched))


def test_what_the_bucket_has_no_more_goes(model):
    """A reader would prefer one whole file to the parts that have come in its place."""
    folder = resolve_checkpoint(str(model))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    (model / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(weights.read_bytes())
    weights.unlink()
    assert resolve_checkpoint(str(model)) == folder
    assert [file.name for file in (folder / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]


def test_half_of_another_version_is_not_taken(model, monkeypatch):
    resolve_checkpoint(str(model))
    for name in ("vae", "unet"):
        (model / name / "config.json").write_bytes(b"{ }")
    whole = buckets.download

    def killed(there, here, copied):
        if there.parent.name == "vae":
            raise KeyboardInterrupt
        return whole(there, here, copied)

    monkeypatch.setattr(buckets, "download", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve_checkpoint(str(model))
    monkeypatch.setattr(type(model), "iterdir", unreachable)
    with pytest.raises(UserError, match=r"tiny cannot be reached \(no route\)"):
        resolve_checkpoint(str(model))


def test_half_a_file(model, monkeypatch):
    monkeypatch.setattr(
        buckets, "download", lambda there, here, copied: here.write_bytes(b"{") and ""
    )
    with pytest.raises(UserError, match=r"model_index.json: 1 bytes arrived of \d+; the same"):
        resolve_checkpoint(str(model))


def test_out_of_reach(model, monkeypatch):
    """What was fetched before is taken, and what never was is an error."""
    folder = resolve_checkpoint(str(model))
    monkeypatch.setattr(type(model), "iterdir", unreachable)
    with pytest.warns(UserWarning, match=r"cannot be reached \(no route\).* fetched before"):
        assert resolve_checkpoint(str(model)) == folder
    with pytest.raises(UserError, match=r"tiny cannot be reached \(no route\)"):
        buckets._names(model, "model_index.json")


def unreachable(*args):
    raise OSError("no route")


def test_what_is_not_there(bucket, model):
    with pytest.raises(MissingFileError, match=r"none: there is no model_index.json: give"):
        resolve_checkpoint(str(bucket / "none"))
    with pytest.raises(MissingFileError, match=r"x.safetensors: there is no such file"):
        resolve_checkpoint(str(bucket / "x.safetensors"))
    with pytest.raises(MissingFileError, match=r"none/vae: there is no config.json"):
        resolve_vae(str(bucket / "none"))
    with pytest.raises(MissingFileError, match=r"vae.safetensors: there is no such file"):
        resolve_vae(str(bucket / "vae.safetensors"))


def test_nothing_large_is_fetched_of_a_pipeline_that_is_not_supported(model, capsys):
    (model / "model_index.json").write_bytes(b'{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="a FluxPipeline is not supported"):
        resolve_checkpoint(str(model))
    assert capsys.readouterr().out.count("fetching") == 1


def test_no_weights_are_fetched_of_a_model_that_cannot_be_loaded(model, capsys):
    config = model / "scheduler" / "scheduler_config.json"
    config.write_bytes(b'{"_class_name": "LCMScheduler"}')
    with pytest.raises(UserError, match="LCMScheduler"):
        open_checkpoint(str(model))
    (fetched,) = cache_home().glob("models/*/")
    assert (fetched / "unet" / "config.json").is_file()
    assert not list(fetched.rglob("*.safetensors"))


def test_pickles_are_never_fetched(model, capsys):
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet: pickled weights can run code"):
        resolve_checkpoint(str(model))
    with pytest.raises(UserError, match="pickle"):
        resolve_checkpoint(str(model.parent / "x.ckpt"))
    assert not capsys.readouterr().out
