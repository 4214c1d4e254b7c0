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


@pytest.fixture
def online(cache, monkeypatch):
    """A hub that has that model; `online(name=error)` makes one of its calls fail."""

    def change(**failures):
        def call(name, answer):
            def answers(*args, **options):
                if name in failures:
                    raise failures[name]
                asked.append((name, *args[-1:], options))
                return answer

            return answers

        module, api = huggingface_hub, huggingface_hub.HfApi
        index = str(cache / "model_index.json")
        monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(module, "hf_hub_download", call("hf_hub_download", index))
        monkeypatch.setattr(api, "list_repo_files", call("list_repo_files", NAMES))
        monkeypatch.setattr(module, "snapshot_download", call("snapshot_download", str(cache)))
        return asked

    asked = []
    change()
    return change


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


def test_says_that_it_could_not_look_for_the_rest(online, cache):
    online(list_repo_files=OSError("no route"))
    with pytest.warns(UserWarning, match=r"someone/tiny: the hub was not reached \(no route\)"):
        assert hub.download("someone/tiny") == cache


def test_fetches_what_the_list_names_of_one_commit(online, cache):
    assert hub.download("someone/tiny") == cache
    assert online() == [
        ("hf_hub_download", "model_index.json", {}),
        ("list_repo_files", "someone/tiny", {"revision": cache.name}),
        *(
            ("snapshot_download", "someone/tiny", {"revision": cache.name, "allow_patterns": files})
            for files in (SMALL, hub.files_to_fetch(NAMES))
        ),
    ]


def test_nothing_large_is_fetched_of_a_pipeline_that_is_not_supported(online, cache):
    (cache / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="a FluxPipeline is not supported"):
        load_pipeline("someone/tiny")
    assert [name for name, *_ in online()] == ["hf_hub_download"]


def test_no_weights_are_fetched_of_a_model_that_cannot_be_loaded(online, cache):
    (cache / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    with pytest.raises(UserError, match="LCMScheduler"):
        load_pipeline("someone/tiny")
    (fetched,) = (options for name, *_, options in online() if name == "snapshot_download")
    assert fetched["allow_patterns"] == SMALL


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
    names = [*SMALL, *shards, index, "text_encoder/model.fp16.safetensors"]
    assert sorted(hub.files_to_fetch(names)) == sorted(names)


def test_pickles_are_never_fetched():
    names = [*SMALL, "unet/diffusion_pytorch_model.bin"]
    with pytest.raises(UserError, match=r"a/b/unet: pickled weights can run code"):
        hub.files_to_fetch(names, "a/b")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (refusal(errors.RepositoryNotFoundError), MissingFileError, "no such model on the hub"),
        (refusal(errors.GatedRepoError), UserError, "licence accepted .*HF_TOKEN"),
        (refusal(errors.RemoteEntryNotFoundError), UserError, "no model_index.json in it"),
        (refusal(errors.HfHubHTTPError), UserError, r"could not be fetched .*\(refused\)"),
        (errors.LocalEntryNotFoundError("no route"), MissingFileError, r"not reached.*no route"),
    ],
)
def test_what_cannot_be_had(error, kind, message, online):
    online(hf_hub_download=error)
    with pytest.raises(kind, match=rf"someone/else: .*{message}"):
        load_pipeline("someone/else")


def test_a_disk_that_fills_up(online):
    online(snapshot_download=OSError("No space left on device"))
    with pytest.raises(UserError, match=r"No space left on device\); the same command goes on"):
        load_pipeline("someone/tiny")


def test_offline_and_not_in_the_cache(cache):
    with pytest.raises(MissingFileError, match="someone/else: .* not in the hub's cache"):
        load_pipeline("someone/else")
