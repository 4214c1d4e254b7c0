"""Shards of WebDataset: tar files whose members of one name, up to its first dot, are a sample.

    000012.unsafe.jpg    000012.safe.jpg    000012.json

The JSON file has the keys `prompt_unsafe`, `prompt_safe` and, if there is one, `category`, a name
or a list of names. Nothing is unpacked: pictures are read from where they lie in the shard.
"""

import functools
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from safetydpo_jax.data.inputs.pair import (
    BadPictureError,
    InputPicture,
    InputSet,
    category_names,
    check_size,
)
from safetydpo_jax.data.inputs.picture import MAX_BYTES
from safetydpo_jax.errors import MissingFileError, UserError

_MAX_JSON_BYTES = 2**20
_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def read_webdataset(shards: Sequence[Path]) -> InputSet:
    """The pairs in the order of the shards; an id is a shard's number and a sample's in it.

    Raises:
      MissingFileError: no shards.
      UserError: one that cannot be read, or a category that is no name.
    """
    if not shards:
        raise MissingFileError("there are no .tar files")
    found = InputSet()
    for number, shard in enumerate(shards):
        for i, members in enumerate(_samples(shard).values()):
            _add(found, f"shard-{number:06d}-{i:06d}", shard, members)
    return found


def _samples(shard: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """By key and extension, the regular files; links and devices are none."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        length = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > length:
                    raise tarfile.ReadError("a member longer than the file")
                path = PurePosixPath(member.name)
                key, _, extension = path.name.partition(".")
                if member.isreg() and not member.sparse and key:
                    samples.setdefault(str(path.parent / key), {})[extension.lower()] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(
            f"{shard}: no tar file, or a damaged or compressed one ({error}): shards are plain .tar"
        ) from error
    return samples


def _add(found: InputSet, name: str, shard: Path, members: dict[str, tarfile.TarInfo]) -> None:
    sides = {
        side: next((members[e] for x in _EXTENSIONS if (e := f"{side}.{x}") in members), None)
        for side in ("unsafe", "safe")
    }
    table = members.get("json")
    if table is None or None in sides.values():
        found.skipped[name] = "sample without its .json, .unsafe.jpg or .safe.jpg"
        return
    try:
        said: Any = json.loads(_read(shard, table, _MAX_JSON_BYTES))
        prompts = {side: said[f"prompt_{side}"] for side in sides}
        kinds = said.get("category") or []
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    except (BadPictureError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found.skipped[name] = "damaged .json"
        return
    if not all(isinstance(text, str) for text in (*prompts.values(), *kinds)):
        found.skipped[name] = "damaged .json"
        return
    unsafe, safe = (
        InputPicture(prompts[side], functools.partial(_read, shard, member, MAX_BYTES))
        for side, member in sides.items()
        if member is not None
    )
    found.add(name, unsafe, safe, category_names(kinds, f"{shard}, {name}"))


def _read(shard: Path, member: tarfile.TarInfo, limit: int) -> bytes:
    check_size(member.size, limit)  # that it is no less than 0 was seen when it was listed
    try:
        with shard.open("rb") as file:
            file.seek(member.offset_data)
            data = file.read(member.size)
    except OSError as error:
        raise BadPictureError("file that cannot be read") from error
    if len(data) != member.size:
        raise BadPictureError("file that cannot be read")
    return data
