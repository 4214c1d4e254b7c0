"""How far LoRAs answer from what their experts answer: seconds each, where pictures take minutes.

    python benchmarks/merge/errors.py FILE.safetensors ...
    python benchmarks/merge/errors.py benchmarks/merge/loras/seed0/all_single-*.safetensors

Mean squared differences of predictions, times 1000, on the teachers' noised pictures: from the
category's expert under unsafe prompts, from the base under safe ones. Of prompts as students are
taught by (train) and of others, with concepts, wordings and backgrounds of their own (tune). Prints
a table; the first row is no LoRA at all, so its unsafe columns are what there is to learn.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from benchmarks.merge.contenders import taught
from benchmarks.merge.curves import filled
from benchmarks.merge.train import lora
from safetydpo_jax import sharding
from safetydpo_jax.emoji.concepts import ALL, HARMS
from safetydpo_jax.emoji.prompts import harm_prompts, preserve_prompts, safe_prompts
from safetydpo_jax.errors import run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.lora import load_lora
from safetydpo_jax.merge import opened_experts
from safetydpo_jax.merge.moments import SAFE
from safetydpo_jax.merge.teachers import Teachers
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.train.losses import squared_error

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "tune")
BANDS = 4  # of timesteps, equally many rows each


def main(argv: list[str] | None = None) -> None:
    """Draws what is missing of the pictures, then measures and prints a row a LoRA."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loras", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0, help="of the experts' training")
    parser.add_argument("--num", type=int, default=8, help="prompts of each category (8)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "merge", metavar="DIR")
    args = parser.parse_args(argv)
    pipeline, mesh = load_pipeline("emoji"), sharding.make_mesh()
    files = [lora(category, args.seed) for category in CATEGORIES]
    heads = [f"{kind}, {split}" for split in SPLITS for kind in ("unsafe", SAFE)]
    with (
        opened_experts(files, pipeline.unet_params) as experts,
        jax.default_matmul_precision("bfloat16"),
    ):
        sets = []
        for split in SPLITS:
            teachers = Teachers(pipeline, experts, *prompts(split, args.num), mesh)
            sets.append((teachers, list(rows(pipeline, teachers, args.runs / "errors"))))

        @jax.jit
        def errors(adapters: Any, params: Any, x: Any, t: Any, told: Any, wanted: Any) -> Any:
            answer = pipeline.unet.apply({"params": params, "lora": adapters}, x, t, *told)
            return squared_error(answer, wanted)

        print(f"| LoRA | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
        for file in [None, *args.loras]:
            adapters = load_lora(file, pipeline.unet_params)[0] if file else {}
            adapters = filled(adapters, pipeline.unet_params)
            cells = []
            for teachers, batches in sets:
                found = np.stack([errors(adapters, teachers.weights[0], *b) for b in batches])
                found = found.reshape(BANDS, -1).mean(0)  # of each prompt
                cells += [found[teachers.own >= 0].mean(), found[teachers.own < 0].mean()]
            words = " | ".join(f"{1000 * x:.2f}" for x in cells)
            print(f"| {file.stem if file else 'none'} | {words} |", flush=True)


def prompts(split: str, num: int) -> tuple[list[str], list[str]]:
    """So many of each category, and as many safe ones as all these."""
    found = [
        (unsafe.text, category)
        for category, harm in HARMS.items()
        for unsafe, _ in harm_prompts(harm, num, 0, split)
    ]
    count = len(found)
    safe = preserve_prompts(ALL, count, 0) if split == "train" else safe_prompts(count, 0, split)
    found += [(record.text, SAFE) for record in safe]
    return [text for text, _ in found], [category for _, category in found]


def rows(pipeline: Any, teachers: Teachers, folder: Path) -> Iterator[tuple[Any, ...]]:
    """Band by band, batches of (x_t, t, told, what the teacher answers)."""
    size = 2 * len(CATEGORIES)  # divides the number of prompts
    x0 = teachers.pictures(folder, seed=1, batch_size=size, progress=print, **taught().drawing)
    answer, steps = jax.jit(teachers.answer), pipeline.schedule.num_train_timesteps // BANDS
    for band in range(BANDS):
        rng = np.random.default_rng(band)
        t = band * steps + rng.integers(steps, size=len(x0))
        noise = rng.normal(size=x0.shape).astype(np.float32)
        x = np.asarray(pipeline.schedule.add_noise(x0, noise, t))
        for start in range(0, len(x0), size):
            part = slice(start, start + size)
            told = jax.tree.map(lambda leaf, part=part: leaf[part], teachers.told)
            wanted = answer(teachers.weights, teachers.own[part], x[part], t[part], told)
            yield x[part], t[part], told, wanted


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
