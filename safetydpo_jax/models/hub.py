"""Checkpoints on the Hugging Face hub, by huggingface_hub: its cache, its token, its switches.

HF_HOME says where the cache is, HF_TOKEN who asks, HF_HUB_OFFLINE=1 that only the cache counts.
"""

import pathlib
import re
import warnings
from collections.abc import Iterable, Sequence

from safetydpo_jax.errors import MissingFileError, UserError

ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What of a checkpoint is read; other folders of a repository (safety_checker, ...) are not fetched.
_SMALL = re.compile(
    r"model_index\.json|(unet|vae|text_encoder(_2)?)/config\.json"
    r"|scheduler/scheduler_config\.json|tokenizer(_2)?/[^/]+\.(json|txt)"
)
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def download(repo: str) -> pathlib.Path:
    """The folder of a checkpoint in the cache; fetches what of it is not there yet.

    Args:
      repo: its id, as in "stable-diffusion-v1-5/stable-diffusion-v1-5".

    Raises:
      MissingFileError: there is no such model, or no network and no cached copy.
      UserError: it may not be read, or holds no safetensors.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        try:
            names = HfApi().list_repo_files(repo)
        except (GatedRepoError, RepositoryNotFoundError, HFValidationError):
            raise
        except Exception as error:  # of the network, in whatever HTTP library is below
            folder = pathlib.Path(snapshot_download(repo, local_files_only=True))
            if not isinstance(error, ConnectionError):  # what HF_HUB_OFFLINE raises is one
                said = f"{repo}: the hub was not reached ({error}); using {folder}"
                warnings.warn(said, stacklevel=2)
            return folder
        return pathlib.Path(snapshot_download(repo, allow_patterns=files_to_fetch(names, repo)))
    except GatedRepoError as error:
        raise UserError(
            f"{repo}: its owner wants a licence accepted first: do so on its page at the hub, then "
            "set HF_TOKEN or run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise MissingFileError(
            f"{repo}: no such folder here, and no such model on the hub (a private one needs "
            "HF_TOKEN); give the folder of a diffusers checkpoint, a hub id, or 'emoji'"
        ) from error
    except LocalEntryNotFoundError as error:
        raise MissingFileError(
            f"{repo}: no such folder here, the hub cannot be reached, and its cache has no such "
            "model: go online once, or give the folder of a diffusers checkpoint, or 'emoji'"
        ) from error


def files_to_fetch(names: Iterable[str], repo: str = "") -> list[str]:
    """Those of a repository's files that make up the checkpoint.

    Repositories hold the weights in several forms. Safetensors are taken in full precision, or in
    half where there are no others; never pickles.

    Raises:
      UserError: a network's weights are there as pickles only.
    """
    names = sorted(names)
    chosen = [name for name in names if _SMALL.fullmatch(name)]
    for network in _NETWORKS:
        inside = [name for name in names if name.startswith(f"{network}/")]
        weights = _weights(inside)
        if any(name.endswith((".bin", ".ckpt")) for name in inside) and not weights:
            raise UserError(
                f"{repo}/{network}: the hub has only pickled weights, which can run code and are "
                "never read here; convert them once in PyTorch: "
                "pipeline.save_pretrained(folder, safe_serialization=True)"
            )
        chosen += weights
    return chosen


def _weights(names: Sequence[str]) -> list[str]:
    for variant in ("", r"\.fp16"):
        pattern = re.compile(
            rf"[^/]+/(diffusion_pytorch_model|model)({variant}(-\d+-of-\d+)?\.safetensors"
            rf"|\.safetensors\.index{variant}\.json)"
        )
        if found := [name for name in names if pattern.fullmatch(name)]:
            return found
    return []
