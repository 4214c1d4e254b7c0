"""Checkpoints by their id on the hub, from a cache that is made here: there is no network."""

import shutil
import types

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import errors

from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models import hub
from safetydpo_jax.models.pretrained import load_pipeline

# As in a published repository: pickles, half precision, other networks and pictures beside.
SMALL = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
]
NAMES = [
    *SMALL,
    "README.md",
    "v1-5-pruned.safetensors",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture
def cache(model_folder, tmp_path, monkeypatch):
    """A cache that holds the model "someone/tiny"."""
    folder, commit = tmp_path / "models--someone--tiny", "0" * 40
    shutil.copytree(model_folder, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return folder / "snapshots" / commit


def failing(monkeypatch, error):
    def fail(self, repo):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)


def refusal(kind):
    """An answer of the hub's, whichever HTTP library huggingface_hub uses."""
    return kind("refused", response=types.SimpleNamespace(headers={}, request=None))


def test_loads_from_the_cache_when_offline(cache, pipeline):
    found = load_pipeline("someone/tiny")
    assert found.path == cache
    jax.tree.map(np.testing.assert_array_equal, found.unet_params, pipeline.unet_params)


def test_a_folder_of_that_name_comes_first(cache, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "someone/tiny")
    assert str(load_pipeline("someone/tiny").path) == "someone/tiny"


def test_says_that_it_could_not_look_for_something_newer(cache, monkeypatch):
    failing(monkeypatch, OSError("no route"))
    with pytest.warns(UserWarning, match=r"someone/tiny: the hub was not reached \(no route\)"):
        assert hub.download("someone/tiny") == cache


def test_fetches_what_the_list_names(cache, monkeypatch):
    asked = {}

    def fetch(repo, allow_patterns=None, local_files_only=False):
        asked.update(repo=repo, allow_patterns=allow_patterns)
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: NAMES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub.download("someone/tiny") == cache
    assert asked == {"repo": "someone/tiny", "allow_patterns": hub.files_to_fetch(NAMES)}


def test_full_precision_comes_first():
    assert sorted(hub.files_to_fetch(NAMES)) == sorted(
        [
            *SMALL,
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        ]
    )


def test_half_precision_and_shards_where_there_is_nothing_else():
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    names = [*SMALL, *shards, index, "text_encoder_2/model.fp16.safetensors"]
    assert sorted(hub.files_to_fetch(names)) == sorted(names)


def test_pickles_are_never_fetched():
    names = [*SMALL, "unet/diffusion_pytorch_model.bin"]
    with pytest.raises(UserError, match=r"a/b/unet: the hub has only pickled weights"):
        hub.files_to_fetch(names, "a/b")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (refusal(errors.RepositoryNotFoundError), MissingFileError, "no such model on the hub"),
        (refusal(errors.GatedRepoError), UserError, "licence accepted .*HF_TOKEN"),
        (OSError("no route"), MissingFileError, "hub cannot be reached, and its cache"),
    ],
)
def test_what_cannot_be_had(error, kind, message, cache, monkeypatch):
    failing(monkeypatch, error)
    with pytest.raises(kind, match=rf"someone/else: .*{message}"):
        load_pipeline("someone/else")
