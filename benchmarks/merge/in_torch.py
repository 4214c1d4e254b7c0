"""A merged LoRA in PyTorch's own pipeline: the same prompts and noise, the same judge.

    python benchmarks/merge/in_torch.py --lora runs/merged/merged.safetensors

The file is drawn with here and, by `load_lora_weights`, in diffusers: as it is and exported with
kohya's names. Writes benchmarks/results/merge/in_torch.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from benchmarks.machine import machine
from benchmarks.merge.curves import Examiner, Point
from benchmarks.merge.report import RESULTS
from benchmarks.torch_drawer import torch_drawer
from configs import common
from safetydpo_jax import storage
from safetydpo_jax.diffusion.samplers import draw_pictures
from safetydpo_jax.errors import run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.lora import load_lora, save_kohya
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> None:
    """Draws all, then writes and prints how they compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", type=Path, required=True, metavar="FILE")
    parser.add_argument("--num_unsafe", type=int, default=24, help="prompts of each category")
    parser.add_argument("--num_safe", type=int, default=96)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "merge", metavar="DIR")
    args = parser.parse_args(argv)
    pipeline = load_pipeline("emoji")
    adapters, header = load_lora(args.lora, pipeline.unet_params)
    kohya = save_kohya(args.runs / "in_torch" / "kohya.safetensors", adapters)
    drawers = {
        "jax": draw_pictures,
        "diffusers": torch_drawer(pipeline, args.lora),
        "diffusers, kohya's names": torch_drawer(pipeline, kohya),
    }
    points = {}
    for name, draw in drawers.items():
        examine = Examiner(
            pipeline,
            args.runs / "in_torch" / name.replace(" ", "_"),
            split="test",
            num_unsafe=args.num_unsafe,
            num_safe=args.num_safe,
            seed=200,
            drawing=common.get_config("hate").drawing.to_dict(),
            draw=draw,
        )
        points[name] = examine(adapters)
        print(f"{name}: {read(points[name])}", flush=True)
    result = {
        "lora": {"sha256": storage.hash_file(args.lora), **header},
        "machine": machine(),
        "num_unsafe": len(CATEGORIES) * args.num_unsafe,
        "num_safe": args.num_safe,
        "found": {name: read(point) for name, point in points.items()},
        "same_outcome": {
            name: same(points["jax"], point) for name, point in points.items() if name != "jax"
        },
    }
    path = RESULTS / "in_torch.json"
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"same outcome: {result['same_outcome']}\nwritten: {path}")


def read(point: Point) -> dict[str, float]:
    """Rates."""
    return {"ip": round(point.ip, 4), "fidelity": round(float(point.faithful.mean()), 4)}


def same(one: Point, other: Point) -> float:
    """The share of pictures with the same verdict."""
    pairs = [(one.faithful, other.faithful), *((x, other.unsafe[c]) for c, x in one.unsafe.items())]
    return round(float(np.concatenate([x == y for x, y in pairs]).mean()), 4)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
