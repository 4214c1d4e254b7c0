"""Pictures drawn for a list of prompts, and what a judge sees in them: in chunks, kept on disk.

The folder's name is a hash of everything the detections depend on (weights, prompts, seeds,
settings, judge), so a broken-off evaluation goes on where it was, and the base model's pictures are
drawn once for any number of experts that share the folder.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from safetydpo_jax import storage
from safetydpo_jax.diffusion.samplers import draw_pictures
from safetydpo_jax.errors import UserError


@runtime_checkable
class Judge(Protocol):
    """Says what pictures show.

    Attributes:
        name: of the judge and its version; detections of another name are not mixed with its own.
        unsafe_names: those of its names that count as unsafe.
    """

    name: str
    unsafe_names: frozenset[str]

    def __call__(self, pictures: UInt8[np.ndarray, "n H W 3"]) -> Sequence[frozenset[str]]:
        """The names of what each picture shows; an empty set for a picture of nothing."""
        ...

    def backgrounds(self, pictures: UInt8[np.ndarray, "n H W 3"]) -> Sequence[frozenset[str]]:
        """The names of each picture's background colours."""
        ...


class EmojiJudge:
    """The embedded world's own detector.

    Args:
        unsafe_names: concepts that count as unsafe besides those of the seven categories.
    """

    def __init__(self, unsafe_names: Set[str] = frozenset()):
        # Here, because other judges need nothing of the embedded world.
        from safetydpo_jax.emoji import backgrounds, detector
        from safetydpo_jax.emoji.concepts import CATEGORY_OF

        self._detector = detector.Detector.load()
        self.backgrounds = backgrounds.backgrounds
        self.name = f"emoji {storage.hash_file(detector.WEIGHTS)[:12]}, backgrounds 1"
        self.unsafe_names = frozenset(CATEGORY_OF.keys() | unsafe_names)

    def __call__(self, pictures: UInt8[np.ndarray, "n H W 3"]) -> Sequence[frozenset[str]]:
        return self._detector.names(pictures)


@dataclass(frozen=True)
class Detections:
    """What a judge found in n pictures.

    Attributes:
        names: the names found in each picture, in the order of the prompts.
        backgrounds: the names of each picture's background colours.
        pictures: the pictures that were to be kept, by their index.
        seconds: spent drawing and judging by this call: 0 if all was on disk.
    """

    names: list[frozenset[str]]
    backgrounds: list[frozenset[str]]
    pictures: dict[int, UInt8[np.ndarray, "H W 3"]]
    seconds: float


def fingerprint(tree: Any) -> str:
    """Twelve hex digits that change when any path, shape, type or number of a pytree changes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:12]


def detect(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Integer[np.ndarray, " n"],
    judge: Judge,
    folder: Path,
    *,
    adapters: Mapping | None = None,
    batch_size: int = 32,
    keep: Sequence[int] = (),
    draw: Callable[..., np.ndarray] = draw_pictures,
    label: str = "drawing",
    progress: Callable[[str], None] = print,
    **settings: Any,
) -> Detections:
    """Draws and judges one picture a prompt, chunk by chunk, each chunk kept in `folder`.

    Args:
        pipeline: the model, a `models.pretrained.Pipeline`.
        prompts: n texts; only their hash is written.
        seeds: of the initial noise, one a prompt.
        judge: names what the pictures show.
        folder: where to keep the chunks; may be shared between evaluations.
        adapters: a "lora" collection ready to apply; None is the base model.
        batch_size: pictures a chunk.
        keep: indices of the pictures to return as well, as for a grid.
        draw: `samplers.draw_pictures`, or what takes its place.
        label: starts every progress line.
        progress: takes a line after every chunk: done, rate, time left.
        **settings: of the drawing: sampler, num_steps, guidance_scale, ...

    Raises:
        UserError: no prompts, a batch size below 1, not as many seeds as prompts, adapters that
            hold NaN, or pictures that are none (wrong type, shape or number).
    """
    total = len(prompts)
    if total == 0 or batch_size < 1 or len(seeds) != total:
        raise UserError(
            f"{label}: {total} prompts, {len(seeds)} seeds, batch_size {batch_size}: give at least "
            "one prompt, one seed a prompt and a batch_size of 1 or more"
        )
    for leaf in jax.tree.leaves(adapters):
        if not np.isfinite(leaf).all():  # its pictures would be plain black, not NaN
            raise UserError(
                f"{label}: the adapters hold NaN or infinity, so training has diverged; go back to "
                "an earlier checkpoint or a lower learning rate"
            )
    model = [pipeline.unet_params, pipeline.vae_params, pipeline.text_params, adapters]
    key = [fingerprint(model), list(prompts), seeds.tolist(), judge.name, batch_size, settings]
    folder = Path(folder) / storage.digest([*key, sorted(keep)])[:16]
    folder.mkdir(parents=True, exist_ok=True)

    seen: list[tuple[frozenset[str], ...]] = []  # of each picture, its names and its background
    started, drawn, size = time.monotonic(), 0, min(batch_size, total)
    chunks = {start: folder / f"{start:06d}.json" for start in range(0, total, batch_size)}
    for start, file in chunks.items():
        if not file.exists():
            missing = [first for first, other in chunks.items() if not other.exists()]
            firsts = missing[: pipeline.num_devices]  # a chunk on each
            # A short last chunk is filled up, so that its shape needs no compilation of its own.
            index = np.concatenate([np.arange(first, first + size) for first in firsts])
            index = np.minimum(index, total - 1)
            pictures = draw(
                pipeline, [prompts[i] for i in index], seeds[index], adapters=adapters,
                batch_size=batch_size, **settings,
            )  # fmt: skip
            pictures = _checked(pictures, len(index), label)
            for first, chunk in zip(firsts, np.split(pictures, len(firsts)), strict=True):
                chunk = chunk[: total - first]
                for i in set(keep) & set(range(first, first + len(chunk))):
                    Image.fromarray(chunk[i - first]).save(folder / f"{i:06d}.png")
                both = zip(judge(chunk), judge.backgrounds(chunk), strict=True)
                found = [[sorted(names) for names in pair] for pair in both]
                # Written last: it stands for the whole chunk.
                storage.write_file(chunks[first], json.dumps(found).encode())
                drawn += len(chunk)
        seen += [tuple(map(frozenset, pair)) for pair in json.loads(file.read_text())]
        done = min(start + batch_size, total)
        progress(f"{label}: {_pace(done, total, drawn, time.monotonic() - started)}")
    kept = {i: _read_picture(folder / f"{i:06d}.png") for i in keep}
    names, backgrounds = map(list, zip(*seen, strict=True))
    return Detections(names, backgrounds, kept, time.monotonic() - started if drawn else 0.0)


def _read_picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _checked(pictures: np.ndarray, expected: int, label: str) -> np.ndarray:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise UserError(
            f"{label}: pictures must be uint8 (n, H, W, 3), not {pictures.dtype} {pictures.shape}"
        )
    if len(pictures) != expected:
        raise UserError(f"{label}: {len(pictures)} pictures came back for {expected} prompts")
    return pictures


def _pace(done: int, total: int, drawn: int, seconds: float) -> str:
    if not drawn:
        return f"{done}/{total} pictures, from disk"
    rate = drawn / max(seconds, 1e-9)
    return f"{done}/{total} pictures, {rate:.1f}/s, {(total - done) / rate:.0f} s left"
