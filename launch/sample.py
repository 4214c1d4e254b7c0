"""Draws pictures for prompts, with or without a safety adapter.

    python launch/sample.py --model emoji --prompt "a photo of a red apple" --out pictures
    python launch/sample.py --model DIR --lora pytorch_lora_weights.safetensors \
        --prompts prompts.csv --out pictures
    safetydpo sample ...  # the same, from the installed package

The CSV has the columns prompt and image, where image is the name of the file to write (.png, .jpg),
and may have seed; other columns are ignored. A picture that is already there is not drawn again, so
an interrupted run goes on where it was; .drawn.json beside them says with what they were drawn, and
others are not mixed with them. The prompts of a CSV are never printed.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path, PurePosixPath
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import add_drawing_arguments, add_model_arguments, local_path
from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.host_memory import use_huge_pages

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
GRID_NAME = "grid.png"
DRAWN = ".drawn.json"  # with what the pictures of a table were drawn
GRID_COLUMNS, GRID_PICTURES = 8, 64
MAX_SEED = 2**32 - 1
MAX_NAME = 200  # bytes; file systems end at 255, and the unfinished file's name is longer


class Request(NamedTuple):
    """One picture to draw: its prompt, its seed and the file it goes to."""

    prompt: str
    seed: int
    path: Path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--vae", default="", help="another autoencoder: a folder, a .safetensors file, or an id"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompts", type=Path, metavar="FILE.csv", help="columns prompt,image[,seed]"
    )
    what.add_argument("--prompt", help="one prompt, drawn anew into picture_SEED.png")
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="where pictures go"
    )
    parser.add_argument("--lora", type=Path, metavar="FILE", help="adapter (.safetensors)")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the adapter (1)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (25)")
    add_drawing_arguments(parser)
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        help="0 to 1, against what guidance overexposes, as of zero-terminal-SNR models (0)",
    )
    parser.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first picture; row i without a seed has seed + i",
    )
    parser.add_argument(
        "--batch_size", type=int, help="pictures at a time (32 of 64 px, 8 of 512, 2 of 1024)"
    )
    parser.add_argument(
        "--grid", action="store_true", help=f"also write {GRID_NAME}, the first {GRID_PICTURES}"
    )
    arguments = parser.parse_args(argv)
    for name in ("steps", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: it must be 1 or more")
    if not 0 <= arguments.guidance_rescale <= 1:
        parser.error(f"--guidance_rescale {arguments.guidance_rescale}: it must be 0 to 1")
    if arguments.lora is None and arguments.scale != 1.0:
        parser.error("--scale is the strength of an adapter: give --lora as well")
    return arguments


def read_requests(table: Path, out: Path, first_seed: int, reserved: str | None) -> list[Request]:
    """Reads a CSV of prompts.

    A message names line and column but never a value: where a comma lacks its quotes, a piece of
    the prompt stands in any column.

    Args:
      table: the CSV file, UTF-8.
      out: the directory the pictures go to; no name may lead out of it.
      first_seed: row i without a seed of its own gets first_seed + i.
      reserved: a file name that no picture may take.

    Returns:
      One request a row, in order.

    Raises:
      UserError: the table is missing, empty or not such a table.
    """
    requests: list[Request] = []
    line_of: dict[Path, str] = {}
    for where, row in read_rows(table, ("prompt", "image"), ("seed",)):
        path = picture_path(row["image"], out, where, reserved)
        if path in line_of:
            raise UserError(
                f"{where}: column image repeats the name of {line_of[path]}; every picture needs a "
                "name of its own"
            )
        line_of[path] = where.rpartition(", ")[2]
        seed = parse_seed(row.get("seed") or str(first_seed + len(requests)), where)
        requests.append(Request(row["prompt"], seed, path))
    return requests


def picture_path(name: str, out: Path, where: str, reserved: str | None) -> Path:
    """The file a row asks for, inside `out` whatever the name says."""
    pure = PurePosixPath(name)
    faults = (
        (not name.strip() or not name.isprintable(), "is empty or holds a control character"),
        (pure.is_absolute() or ".." in pure.parts or "\\" in name, "leads out of --out"),
        (pure.suffix.lower() not in FORMATS, f"does not end in {', '.join(FORMATS)}"),
        (len(os.fsencode(pure.name)) > MAX_NAME, f"is longer than {MAX_NAME} bytes"),
        (str(pure) == reserved, "is that of the --grid"),
    )
    for is_bad, fault in faults:
        if is_bad:
            raise UserError(f"{where}: the name in column image {fault}; write one such as 1.png")
    path = out / pure
    if not path.parent.resolve().is_relative_to(out.resolve()) or path.is_dir():
        raise UserError(f"{where}: the name in column image is a directory or led away by a link")
    return path


def parse_seed(text: str, where: str) -> int:
    """A seed as `initial_latents` takes it."""
    text = text.strip()
    if not (text.isdecimal() and len(text) <= len(str(MAX_SEED)) and int(text) <= MAX_SEED):
        raise UserError(f"{where}: the seed must be a whole number from 0 to {MAX_SEED}")
    return int(text)


def write_picture(path: Path, pixels) -> None:
    """Writes an image so that its name appears only once it is whole."""
    from PIL import Image

    part = path.with_name(path.name + ".part")
    Image.fromarray(pixels).save(part, format=FORMATS[path.suffix.lower()], quality=95)
    os.replace(part, path)


def read_picture(path: Path):
    """An RGB picture; UserError if it is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise UserError(
            f"{path} is no whole picture: remove it, and the same command draws it again"
        ) from error


def write_grid(paths: list[Path], target: Path) -> None:
    """Writes a contact sheet of the pictures, row by row, at the size of the first."""
    import numpy as np
    from PIL import Image

    size = read_picture(paths[0]).size
    columns = min(GRID_COLUMNS, len(paths))
    rows = -(-len(paths) // columns)
    sheet = Image.new("RGB", (columns * size[0], rows * size[1]), "white")
    for index, path in enumerate(paths):
        row, column = divmod(index, columns)
        sheet.paste(read_picture(path).resize(size), (column * size[0], row * size[1]))
    write_picture(target, np.asarray(sheet))


def check_drawn(out: Path, arguments: argparse.Namespace) -> None:
    """Leaves word of how a table's pictures are drawn, or compares it with the word that was left.

    Raises:
      UserError: pictures are there that were drawn with something else.
    """
    from safetydpo_jax import storage  # here: --help needs none of it

    options = "model model_config vae dtype scale sampler steps guidance_scale guidance_rescale"
    now = {name: getattr(arguments, name) for name in [*options.split(), "seed"]}
    if (model := Path(arguments.model)).exists():
        now["model"] = str(model.resolve())
    if arguments.lora is not None:
        now["lora"] = f"{arguments.lora.name}, {storage.hash_file(arguments.lora)[:16]}"
    now["negative_prompt"] = storage.digest(arguments.negative_prompt)[:16]
    file, pictures = out / DRAWN, (x for x in out.rglob("*") if x.suffix.lower() in FORMATS)
    there = any(x.name != GRID_NAME for x in pictures)
    if there and file.is_file():
        before = json.loads(file.read_text())
        storage.check_same(out, before, now, "or give another --out")
    elif not there:
        storage.write_file(file, (json.dumps(now, indent=1) + "\n").encode())


def draw(requests: list[Request], arguments: argparse.Namespace) -> None:
    """Loads the model and draws the requests, telling how far it is after every batch."""
    from safetydpo_jax.compilation import keep_compiled
    from safetydpo_jax.diffusion import SAMPLERS, iterate_pictures
    from safetydpo_jax.lora.adapters import scaled
    from safetydpo_jax.lora.reader import load_lora
    from safetydpo_jax.models.checkpoint import open_checkpoint
    from safetydpo_jax.models.pipeline import pictures_at_once
    from safetydpo_jax.models.pretrained import load_pipeline

    base = open_checkpoint(arguments.model, vae=arguments.vae, configs=arguments.model_config)
    SAMPLERS[arguments.sampler](base.schedule, arguments.steps)  # before its weights are read
    adapters = None
    if arguments.lora is not None:
        adapters, _ = load_lora(arguments.lora, base.shapes["unet"])
        adapters = scaled(adapters, alpha=arguments.scale, rank=1)
    keep_compiled()
    pipeline = load_pipeline(
        arguments.model,
        dtype=arguments.dtype,
        vae=arguments.vae,
        configs=arguments.model_config,
        progress=lambda line: print(line, flush=True),
    )
    most = arguments.batch_size or pictures_at_once(pipeline.resolution**2)
    turns = -(-len(requests) // most)
    batches = iterate_pictures(
        pipeline,
        [request.prompt for request in requests],
        [request.seed for request in requests],
        adapters=adapters,
        batch_size=-(-len(requests) // turns),  # equal, as the last is filled up with copies
        sampler=arguments.sampler,
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        guidance_rescale=arguments.guidance_rescale,
        negative_prompt=arguments.negative_prompt,
    )
    done, before = 0, time.monotonic()
    for pictures in batches:
        for request, pixels in zip(requests[done:], pictures, strict=False):
            write_picture(request.path, pixels)
        done, now = done + len(pictures), time.monotonic()
        # The rate of this batch alone: the first one's time is mostly compilation.
        rate = len(pictures) / (now - before)
        left = (len(requests) - done) / rate
        print(f"{done}/{len(requests)} pictures, {rate:.2f}/s, {left:.0f} s left", flush=True)
        before = now


def main(argv: list[str] | None = None) -> None:
    """Draws what the command line asks for.

    Args:
      argv: the command line without the program's name; None is the real one.

    Raises:
      UserError: an input that is wrong.
    """
    arguments = parse_arguments(argv)
    if arguments.lora is not None:
        from safetydpo_jax.tensor_file import check_file

        check_file(arguments.lora)  # before a model is fetched
    out, seed = arguments.out, parse_seed(str(arguments.seed), "--seed")
    if arguments.prompts is not None:
        reserved = GRID_NAME if arguments.grid else None
        requests = read_requests(arguments.prompts, out, seed, reserved)
        wanted = [request for request in requests if not request.path.exists()]
    else:
        requests = wanted = [Request(arguments.prompt, seed, out / f"picture_{seed}.png")]
    try:
        for parent in {out, *(request.path.parent for request in wanted)}:
            parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this directory ({error.strerror})") from error
    if len(wanted) < len(requests):
        kept = len(requests) - len(wanted)
        print(f"{kept} of {len(requests)} pictures are already in {out}: they are kept", flush=True)
    if wanted:
        from safetydpo_jax.storage import check_writable

        for request in {request.path.parent: request for request in wanted}.values():
            check_writable(request.path)  # now, not after a batch is drawn
    if arguments.prompts is not None:
        check_drawn(out, arguments)
    if wanted:
        draw(wanted, arguments)
    if arguments.grid:
        write_grid([request.path for request in requests[:GRID_PICTURES]], out / GRID_NAME)
        print(f"the contact sheet is {out / GRID_NAME}")
    print(f"{len(requests)} pictures are in {out}")


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
