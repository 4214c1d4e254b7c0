"""The LoRAs that are merged and compared: of every seed seven experts, and one for all harms.

    python benchmarks/merge/train.py                    # seed 0
    python benchmarks/merge/train.py --seeds 0 1 2
    python benchmarks/merge/train.py --only pairs       # or experts, or all_single

By configs/all_experts.py and configs/all_single.py, without reports. The LoRA for all is trained
once at each of `ALL_RANKS`. Pairs are drawn once for all seeds. Resumes. Keeps those of
benchmarks/merge/loras/seedN/NAME.safetensors that are missing, in half precision (0.4 MB each).
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from safetydpo_jax.data import make_pairs
from safetydpo_jax.errors import run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file
from safetydpo_jax.tensor_file import opened
from safetydpo_jax.train import loop
from safetydpo_jax.train.expert import LORA_FILE
from safetydpo_jax.train.settings import resolve_all

ROOT = Path(__file__).resolve().parents[2]
LORAS = Path(__file__).resolve().parent / "loras"
ALL_RANKS = (4, 28)


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=("pairs", "experts", "all_single"))
    parser.add_argument("--ranks", type=int, nargs="+", default=ALL_RANKS, choices=ALL_RANKS)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "merge", metavar="DIR")
    args = parser.parse_args(argv)
    pairs = args.runs / "pairs"
    if args.only == "pairs":
        draw_pairs(pairs)
    for seed in args.seeds:
        if args.only in (None, "experts"):
            config = load_config("all_experts", seed)
            for category, expert in config.experts.items():
                expert.pairs.path = str(pairs / category / "pairs")
            train(args.runs, "experts", config)
        for rank in args.ranks if args.only in (None, "all_single") else ():
            config = load_config("all_single", seed)
            config.pairs.path, config.lora.rank = str(pairs / "all" / "pairs"), rank
            train(args.runs, all_single(rank), config)
    print(f"written: {LORAS}")


def train(runs: Path, name: str, config: Any) -> None:
    """One run, unless all that comes of it is kept."""
    workdir = runs / f"{name}-seed{config.seed}"
    kept = CATEGORIES if name == "experts" else [name]
    if missing := [x for x in kept if not lora(x, config.seed).is_file()]:
        draw_pairs(runs / "pairs")
        loop.run(config, workdir)
        for x in missing:
            folder = workdir / x if name == "experts" else workdir
            keep(folder / "export" / LORA_FILE, lora(x, config.seed))


def load_config(name: str, seed: int) -> Any:
    """The config as launch/train.py has it, without the report that ends a run."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.seed, config.report.enabled = seed, False
    return config


def draw_pairs(folder: Path) -> None:
    """Those of every category, and of all, where they are missing."""
    configs = [
        x for name in ("all_experts", "all_single") for x in resolve_all(load_config(name, 0))
    ]
    wanted = {c.category: c for c in configs if not (folder / c.category / "pairs").exists()}
    if wanted:
        pipeline = load_pipeline("emoji")
        for category, config in wanted.items():
            make_pairs(config, pipeline, folder / category)


def all_single(rank: int) -> str:
    """The name of the LoRA for all harms of a rank."""
    return f"all_single-rank{rank}"


def lora(name: str, seed: int) -> Path:
    """Where a LoRA is kept."""
    return LORAS / f"seed{seed}" / f"{name}.safetensors"


def keep(export: Path, path: Path) -> None:
    """Copies an exported LoRA in half precision."""
    with opened(export) as file:
        header = file.metadata()
        halves = {key: file.read(key).astype(np.float16) for key in file.keys()}  # noqa: SIM118
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, safetensors.numpy.save(halves, header))


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
