"""The training set on disk: pictures as one memory-mapped array, and their captions."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from safetydpo_jax import storage
from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.data.encode import square
from safetydpo_jax.errors import MissingFileError, UserError


def prepare_pictures(config: Any, workdir: pathlib.Path) -> tuple[np.ndarray, list[str]]:
    """Writes the set once into workdir/pictures and opens it.

    Args:
      config: source "emoji" (scenes of the embedded world) or a folder with pictures and a
        metadata.csv of columns file_name,text; count, the most pictures to use; seed (for "emoji");
        resolution in px.

    Returns:
      Pictures (n, resolution, resolution, 3) uint8, memory-mapped, and n captions.
    """
    folder = pathlib.Path(workdir) / "pictures"
    captions = folder / "captions.json"
    if not captions.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        count, pairs = _open_source(config)
        shape = (count, config.resolution, config.resolution, 3)
        array = np.lib.format.open_memmap(
            folder / "pictures.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        texts = []
        for i, (picture, text) in enumerate(pairs):
            array[i] = picture
            texts.append(text)
            if (i + 1) % 5000 == 0:
                print(f"pictures: {i + 1}/{count}", flush=True)
        array.flush()
        storage.write_file(captions, json.dumps(texts).encode())  # last: it says that all is there
    return np.load(folder / "pictures.npy", mmap_mode="r"), json.loads(captions.read_text())


def _open_source(config: Any) -> tuple[int, Iterator[tuple[np.ndarray, str]]]:
    if config.source == "emoji":
        from safetydpo_jax.emoji import prompts, scenes

        if config.resolution != scenes.SIDE:
            raise UserError(
                f"data.resolution is {config.resolution}: the embedded world's pictures have "
                f"{scenes.SIDE} px"
            )
        stream = prompts.training_scenes(config.seed, config.count)
        return config.count, ((scenes.render(scene), text) for scene, text in stream)
    folder = pathlib.Path(config.source)
    table = folder / "metadata.csv"
    if not table.is_file():
        raise MissingFileError(f"{table}: missing; it lists the pictures as file_name,text")
    rows = [row for _, row in read_rows(table, ("file_name", "text"))]
    if (more := len(rows) - config.count) > 0:
        print(f"{table}: data.count leaves out the last {more} of {len(rows)}", flush=True)
    rows = rows[: config.count]
    return len(rows), _read_folder(folder, rows, config.resolution)


def _read_folder(
    folder: pathlib.Path, rows: list[dict[str, str]], resolution: int
) -> Iterator[tuple[np.ndarray, str]]:
    for row in rows:
        file = (folder / row["file_name"]).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise UserError(
                f"{folder / 'metadata.csv'}: {row['file_name']!r} is outside the folder"
            )
        try:
            with Image.open(file) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except FileNotFoundError as error:
            raise MissingFileError(f"{file}: named in metadata.csv, but missing") from error
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"{file}: not a readable picture ({error})") from error
        yield square(pixels, resolution), row["text"]
