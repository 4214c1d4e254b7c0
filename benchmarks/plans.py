"""Steps of Stable Diffusion in bfloat16 compiled for TPU slices: memory, cycles, collectives.

    python benchmarks/plans.py                     # needs pip install 'safetydpo-jax[tpu]', no TPU
    python benchmarks/plans.py --cases sd15_v5e_4

Minutes to hours each on two cores. Writes benchmarks/results/plans/CASE.json and CASE.png; a case
whose file is there is not compiled again.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and configs

from benchmarks.machine import machine
from configs import hate
from safetydpo_jax import plan
from safetydpo_jax.errors import run_main
from safetydpo_jax.storage import write_file
from safetydpo_jax.yaml_file import read_yaml

PRICES = Path(__file__).resolve().parents[1] / "configs" / "prices.yaml"
RESULTS = Path(__file__).resolve().parent / "results" / "plans"


# Base -> pairs a chip, remat.
BASES = {"sd15": (4, False), "sdxl": (4, True)}
SLICES = {
    "v5e_4": "v5e:2x2",
    "v5e_256": "v5e:16x16",
    "v6e_256": "v6e:16x16",
    "v5p_128": "v5p:4x4x8",
}
CASES = {f"{base}_{name}": (base, topology) for base in BASES for name, topology in SLICES.items()}


def main(argv: list[str] | None = None) -> None:
    """Compiles what is not there, and prints each plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args(argv)
    plan.use_cpu()
    for case in args.cases:
        file = RESULTS / f"{case}.json"
        if file.is_file():
            found = json.loads(file.read_text())
        else:
            base, topology = CASES[case]
            pairs, remat = BASES[base]
            config = hate.get_config(base)
            config.dtype, config.accumulation, config.remat = "bfloat16", 1, remat
            config.batch_size = pairs * len(plan.slice_of(topology)[1])
            passes = topology == SLICES["v5e_4"]  # each chip runs them alone, whatever the slice
            price = read_yaml(PRICES, "a line each, v5e: 1.20")[topology.partition(":")[0]]
            found = plan.of_training(config, topology, price, passes=passes) | {
                "machine": machine()
            }
            RESULTS.mkdir(parents=True, exist_ok=True)
            if found["fits"]:
                plan.draw(found, file.with_suffix(".png"))
            write_file(file, (json.dumps(found, indent=1) + "\n").encode())
        print("\n".join([f"== {case}", *plan.lines(found), f"in {file}"]), flush=True)


if __name__ == "__main__":
    run_main(main)
