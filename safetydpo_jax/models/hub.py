"""Checkpoints on the Hugging Face hub, by huggingface_hub: its cache, its token, its switches.

HF_HOME says where the cache is, HF_TOKEN who asks, HF_HUB_OFFLINE=1 that only the cache counts.
"""

import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from safetydpo_jax.errors import MissingFileError, UnreachableError, UserError, first_line, no_place
from safetydpo_jax.models.state_dict import ONLY_PICKLES, choose_weights
from safetydpo_jax.tensor_file import PICKLES

ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
INDEX = "model_index.json"
# What of a checkpoint is read; other folders of a repository (safety_checker, ...) are not fetched.
SMALL = re.compile(
    r"model_index\.json|(unet|vae|text_encoder(_2)?)/config\.json"
    r"|scheduler/scheduler_config\.json|tokenizer(_2)?/[^/]+\.(json|txt)"
)
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def download(
    repo: str,
    check: Callable[[pathlib.Path], Any] = lambda index: None,
    index_name: str = INDEX,
    check_configs: Callable[[pathlib.Path], Any] = lambda folder: None,
) -> pathlib.Path:
    """The folder of a checkpoint in the cache; fetches what of it is not there yet.

    Args:
      repo: its id, as in "stable-diffusion-v1-5/stable-diffusion-v1-5".
      check: called with the index before anything else is fetched.
      index_name: model_index.json for a whole checkpoint, config.json for a single network.
      check_configs: called with a checkpoint's folder before its weights are fetched.

    Raises:
      MissingFileError: there is no such model, or no network and no cached copy.
      UserError: it may not be read, holds no safetensors, or the hub or the disk failed.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # Takes the cached one if the hub cannot be reached.
        index = pathlib.Path(huggingface_hub.hf_hub_download(repo, index_name))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo}: its owner wants a licence accepted first: do so on its page at the hub, then "
            "set HF_TOKEN or run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise MissingFileError(
            f"{repo}: no such folder here, and no such model on the hub (a private one needs "
            "HF_TOKEN); give the folder of a diffusers checkpoint, a hub id, or 'emoji'"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise MissingFileError(
            f"{repo}: no such folder here, not in the hub's cache, and the hub was not reached: go "
            "online (without HF_HUB_OFFLINE) once, or give the folder of a diffusers checkpoint, "
            f"or 'emoji' ({first_line(error)})"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{repo}: no {index_name} in it: on the hub, but "
            + (
                "not in the diffusers layout"
                if index_name == INDEX
                else "no network by itself: give the id of one, or the folder of a checkpoint here"
            )
        ) from error
    except Exception as error:
        raise _failed(repo, error) from error
    check(index)
    folder = index.parent
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return folder  # whoever reads it says what is missing
    try:
        # Of the commit of the index: a repository may change in between.
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=folder.name)
    except Exception as error:  # of the network, in whatever HTTP library is below
        said = f"{repo}: the hub was not reached ({first_line(error)}); using {folder}"
        warnings.warn(said, stacklevel=2)
        return folder

    def fetch(wanted: list[str]) -> None:
        try:
            huggingface_hub.snapshot_download(repo, revision=folder.name, allow_patterns=wanted)
        except Exception as error:
            raise _failed(repo, error) from error

    if index_name == INDEX:
        wanted = files_to_fetch(names, repo)
        fetch([name for name in wanted if SMALL.fullmatch(name)])
        check_configs(folder)
    else:
        wanted = [index_name, *network_files(names, repo)]
    fetch(wanted)
    return folder


def files_to_fetch(names: Iterable[str], repo: str = "") -> list[str]:
    """Those of a repository's files that make up the checkpoint; see `choose_weights`.

    Raises:
      UserError: a network's weights are there as pickles only.
    """
    names = sorted(names)
    chosen = [name for name in names if SMALL.fullmatch(name)]
    for network in _NETWORKS:
        chosen += network_files(names, f"{repo}/{network}", f"{network}/")
    return chosen


def network_files(names: Sequence[str], where: str, folder: str = "") -> list[str]:
    """The weights among the files of one network, which are all in one folder.

    Raises:
      UserError: they are there as pickles only.
    """
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    inside = [name for name in inside if "/" not in name]
    weights = choose_weights(inside)
    if not weights and any(name.endswith(PICKLES) for name in inside):
        raise UserError(f"{where}: {ONLY_PICKLES}")
    return [folder + name for name in weights]


def _failed(repo: str, error: Exception) -> UserError:
    return (UserError if no_place(error) else UnreachableError)(
        f"{repo}: could not be fetched from the hub ({first_line(error)}); the same command goes "
        "on with what is missing"
    )
