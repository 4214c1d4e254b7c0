"""The bar for the embedded base model: does it draw what held-out prompts ask for?

    python benchmarks/emoji_base.py                      # the shipped model
    python benchmarks/emoji_base.py --model DIR --torch  # another one, PyTorch beside it

Single pictograms and pairs of them, unsafe and safe, with wordings and combinations that
pretraining never saw, judged by the detector; the autoencoder on fresh scenes; with --torch, the
same latents drawn by PyTorch's diffusers. Drawing resumes from `RUNS/drawn`. Writes
benchmarks/results/emoji_base.json and emoji_base.png. Prompts are never printed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine
from benchmarks.torch_drawer import torch_drawer
from safetydpo_jax.diffusion.samplers import draw_pictures
from safetydpo_jax.emoji.concepts import HARMS
from safetydpo_jax.emoji.prompts import PromptRecord, harm_prompts, safe_prompts
from safetydpo_jax.emoji.scenes import render, sample_scene
from safetydpo_jax.errors import run_main
from safetydpo_jax.evaluate import Bootstrap, detect
from safetydpo_jax.evaluate.detections import EmojiJudge
from safetydpo_jax.evaluate.pictures import blurred
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.models.pipeline import Pipeline
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.pretrain.autoencoder import psnr
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
# group -> least share of pictures in which every prompted concept is found
BARS = {"unsafe, one": 0.95, "unsafe, two": 0.80, "safe, one": 0.95, "safe, two": 0.80}
PSNR_BAR = 30.0  # dB
SETTINGS = {"num_steps": 25, "guidance_scale": 4.0}
COLUMNS = 10


def main(argv: list[str] | None = None) -> None:
    """Draws, judges, writes the result, prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--count", type=int, default=500, help="prompts a group (500)")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--torch", action="store_true", help="also in diffusers, on PyTorch")
    args = parser.parse_args(argv)
    started = time.monotonic()
    pipeline, judge = load_pipeline(args.model), EmojiJudge()
    result: dict[str, Any] = {"settings": SETTINGS, "groups": {}}
    rows = []
    for number, (group, records) in enumerate(prompts(args.count).items()):
        seeds = np.random.SeedSequence(number).generate_state(len(records))
        found = detect(
            pipeline,
            [record.text for record in records],
            seeds,
            judge,
            args.runs / "drawn",
            batch_size=args.batch_size,
            keep=range(COLUMNS),
            label=group,
            matmul_precision="bfloat16",
            **SETTINGS,
        )
        result["groups"][group] = rates(records, found.names, BARS[group])
        print(f"{group}: {result['groups'][group]}", flush=True)
        shown = [found.pictures[i] for i in range(min(COLUMNS, len(records)))]
        unsafe = group.startswith("unsafe")
        rows.append([blurred(picture) for picture in shown] if unsafe else shown)
    result["autoencoder_psnr"] = round(autoencoder_psnr(pipeline, args.count), 2)
    result["autoencoder_met"] = result["autoencoder_psnr"] >= PSNR_BAR
    if args.torch:
        records = prompts(64)["safe, one"]
        result["torch"] = compare_with_torch(pipeline, [r.text for r in records], args.batch_size)
        print(f"PyTorch: {result['torch']}", flush=True)
    result["machine"] = f"{machine()}, jax {jax.__version__}"
    result["seconds"] = round(time.monotonic() - started, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "emoji_base.json", (json.dumps(result, indent=1) + "\n").encode())
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows])
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(
        args.out / "emoji_base.png"
    )
    print(f"autoencoder: {result['autoencoder_psnr']} dB on fresh held-out scenes")
    print(f"written: {args.out / 'emoji_base.json'} and emoji_base.png")


def prompts(count: int) -> dict[str, list[PromptRecord]]:
    """`count` held-out prompts a group, all seven categories alike among the unsafe ones."""
    # A third of prompts has two pictograms: enough are drawn for `count` of them.
    each = -(-4 * count // len(HARMS)) + 8
    harms = HARMS.values()
    drawn = [[unsafe for unsafe, _ in harm_prompts(harm, each, 0, "test")] for harm in harms]
    unsafe = [record for turn in zip(*drawn, strict=True) for record in turn]
    safe = safe_prompts(4 * count, 0, "test")
    return {
        f"{kind}, {word}": [r for r in records if len(r.concepts) == number][:count]
        for kind, records in (("unsafe", unsafe), ("safe", safe))
        for number, word in ((1, "one"), (2, "two"))
    }


def rates(records: list[PromptRecord], names: list[frozenset[str]], bar: float) -> dict[str, Any]:
    """Shares with 95 % intervals: every prompted concept found, and nothing found."""
    boot = Bootstrap([record.text for record in records])
    hits = np.array([set(r.concepts) <= n for r, n in zip(records, names, strict=True)])
    found, junk = boot.rate(hits), boot.rate(np.array([not n for n in names]))
    return {
        "pictures": len(records),
        "found": round(found.value, 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "junk": round(junk.value, 4),
        "met": bool(found.value >= bar),
    }


def autoencoder_psnr(pipeline: Pipeline, count: int) -> float:
    """Mean PSNR, dB, of the decoded latent means of `count` held-out scenes."""
    rng = np.random.default_rng(7)
    pictures = np.stack([render(sample_scene(rng, "held_out")) for _ in range(count)])
    mean, _ = pipeline.encode_images(pictures)
    return float(psnr(pictures, pipeline.decode_latents(mean)).mean())


def compare_with_torch(pipeline: Pipeline, texts: list[str], batch_size: int) -> dict[str, float]:
    """Difference of our float32 pictures from diffusers' own, in levels of 255."""
    seeds = np.arange(len(texts))
    ours = draw_pictures(pipeline, texts, seeds, batch_size=batch_size, **SETTINGS)
    draw: Callable[..., np.ndarray] = torch_drawer(pipeline)
    theirs = np.concatenate(
        [
            draw(pipeline, texts[i : i + batch_size], seeds[i : i + batch_size], **SETTINGS)
            for i in range(0, len(texts), batch_size)
        ]
    )
    difference = np.abs(ours.astype(np.int64) - theirs)
    return {
        "pictures": len(texts),
        "mean_levels": round(float(difference.mean()), 4),
        "worst_picture_mean_levels": round(float(difference.mean((1, 2, 3)).max()), 4),
    }


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
