"""Importing a pair set of CoProV2's size and layout: how long it takes, and how much memory.

    python benchmarks/coprov2.py

The words and pictures are made up. Writes benchmarks/results/coprov2.json: for the command that
makes pair sets and for the TFDS builder, seconds, peak memory of the process and what was counted.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

from benchmarks.machine import machine
from safetydpo_jax.errors import run_main
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "coprov2.json"
PIXELS = 512
BUILD = """
import sys
import tensorflow_datasets as tfds
import safetydpo_jax.data.coprov2
tfds.disable_progress_bar()
for name in ("sd15", "prompts"):
    builder = tfds.builder(f"coprov2/{name}", data_dir=sys.argv[2])
    config = tfds.download.DownloadConfig(manual_dir=sys.argv[1])
    builder.download_and_prepare(download_config=config)
    print({split: info.num_examples for split, info in builder.info.splits.items()})
"""

# As published: pairs listed under each category, in the tables' spelling.
LISTED = {
    "Hate": 4393,
    "sexual": 2712,
    "Violence": 2141,
    "Shocking": 2115,
    "Illegal Activity": 1923,
    "Harrasment": 1801,
    "self-harm": 958,
}
NUM_PAIRS, NUM_TEST, NUM_LEAKED = 15_690, 8_000, 728
_PICTURES = 64  # different ones; a comment in the file makes each its own


def main() -> None:
    """Makes the set in a temporary folder, imports it in a process of its own, notes the result."""
    with tempfile.TemporaryDirectory() as work:
        source, out = Path(work) / "CoProV2", Path(work) / "out"
        write_coprov2(source, pixels=PIXELS)
        command = [sys.executable, "launch/import_pairs.py"]
        imported = timed([*command, "--input", str(source), "--out", str(out)])
        counts = json.loads((out / "report.json").read_text())
        built = timed([sys.executable, "-c", BUILD, str(source), str(Path(work) / "tfds")])
        result = {
            "machine": machine(),
            "pixels": PIXELS,
            "megabytes": round((source / "images.zip").stat().st_size / 1e6),
            "import_pairs": imported,
            "tfds_builder": built,
            "counts": {key: value for key, value in counts.items() if key != "skipped_ids"},
        }
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1), f"written: {RESULT}", sep="\n")


def timed(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory of a command."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} ended with {status}")
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 1), "peak_megabytes": round(used.ru_maxrss * 1024 / 1e6)}


def write_coprov2(folder: Path, *, pixels: int, share: float = 1.0) -> None:
    """Writes CoProv2_train.csv, CoProv2_test.csv and images.zip.

    Args:
      folder: where; made if needed.
      pixels: along a picture's side.
      share: of the published numbers, rounded.
    """
    folder.mkdir(parents=True)
    listed = {name: round(count * share) for name, count in LISTED.items()}
    count = round(NUM_PAIRS * share)
    # Those listed more than once are the first ones, under the next category too.
    order = [name for name, number in listed.items() for _ in range(number)]
    pairs = [(i % count, name) for i, name in enumerate(order)]
    with (folder / "CoProv2_train.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "image", "category"])
        for side in ("u", "s"):
            for i, name in pairs:
                table.writerow([prompt(side, i), f"{side}_idx_{i:07d}_0.jpg", name])
    names = list(LISTED)
    with (folder / "CoProv2_test.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "image", "category"])
        for i in range(round(NUM_TEST * share)):
            leaks = i < round(NUM_LEAKED * share)
            text = f" {prompt('u', i).upper()}" if leaks else f"another word {i}"
            table.writerow([text, f"{i}.jpg", names[i % len(names)]])
    jpegs = [_jpeg(i, pixels) for i in range(_PICTURES)]
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(count):
            for which, side in enumerate("us"):
                data = _commented(jpegs[(2 * i + which) % _PICTURES], f"{side}{i}")
                archive.writestr(f"images/{side}_idx_{i:07d}_0.jpg", data)


def prompt(side: str, number: int) -> str:
    """Of a picture; it holds what a CSV has to quote."""
    return f'{"harm" if side == "u" else "calm"}, "quoted" number {number}'


def _jpeg(seed: int, pixels: int) -> bytes:
    """A smooth picture with some noise, of about the size of a drawn one's file."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    picture = np.asarray(smooth.resize((pixels, pixels), Image.Resampling.BICUBIC), np.int16)
    picture = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=75)
    return file.getvalue()


def _commented(jpeg: bytes, text: str) -> bytes:
    """The file with a comment after its first marker."""
    comment = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


if __name__ == "__main__":
    run_main(main)
