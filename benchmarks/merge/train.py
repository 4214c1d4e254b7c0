"""The LoRAs that are merged and compared: of every seed seven experts, and one LoRA for all harms.

    python benchmarks/merge/train.py                    # seed 0
    python benchmarks/merge/train.py --seeds 0 1 2
    python benchmarks/merge/train.py --only experts     # or all_single

By configs/all_experts.py and configs/all_single.py, without reports. Resumes. Keeps those of
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

from safetydpo_jax.errors import run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.storage import write_file
from safetydpo_jax.tensor_file import opened
from safetydpo_jax.train import loop
from safetydpo_jax.train.expert import LORA_FILE

ROOT = Path(__file__).resolve().parents[2]
LORAS = Path(__file__).resolve().parent / "loras"
ALL = "all_single"


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=("experts", ALL))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "merge", metavar="DIR")
    args = parser.parse_args(argv)
    for seed in args.seeds:
        if args.only != ALL and (missing := [c for c in CATEGORIES if not lora(c, seed).is_file()]):
            workdir = args.runs / f"experts-seed{seed}"
            loop.run(load_config("all_experts", seed), workdir)
            for category in missing:
                keep(workdir / category / "export" / LORA_FILE, lora(category, seed))
        if args.only != "experts" and not lora(ALL, seed).is_file():
            workdir = args.runs / f"{ALL}-seed{seed}"
            loop.run(load_config(ALL, seed), workdir)
            keep(workdir / "export" / LORA_FILE, lora(ALL, seed))
    print(f"written: {LORAS}")


def load_config(name: str, seed: int) -> Any:
    """The config as launch/train.py has it, without the report that ends a run."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.seed, config.report.enabled = seed, False
    return config


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
