"""Training steps of Stable Diffusion compiled for TPU slices: memory, cycles, collectives.

    python benchmarks/plans.py                     # needs pip install 'safetydpo-jax[tpu]', no TPU
    python benchmarks/plans.py --cases sd15_v5e_4

Minutes to hours each on two cores. Writes benchmarks/results/plans/CASE.json and CASE.png; a case
whose file is there is not compiled again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and configs

from benchmarks.machine import machine
from configs import hate
from safetydpo_jax import plan
from safetydpo_jax.errors import run_main
from safetydpo_jax.storage import write_file

RESULTS = Path(__file__).resolve().parent / "results" / "plans"


def sd15(pairs: int) -> dict[str, Any]:
    """SD 1.5 in bfloat16 without remat, so many pairs a step."""
    return {"base": "sd15", "batch_size": pairs, "remat": False}


def sdxl(pairs: int) -> dict[str, Any]:
    """SDXL in bfloat16 with remat, so many pairs a step."""
    return {"base": "sdxl", "batch_size": pairs, "remat": True}


# Case -> (slice, what is set): the chips are the last number of a name, with 2 pairs each of SD
# 1.5 and one of SDXL.
CASES = {
    "sd15_v5e_4": ("v5e:2x2", sd15(8)),
    "sd15_v5e_256": ("v5e:16x16", sd15(512)),
    "sd15_v6e_256": ("v6e:16x16", sd15(512)),
    "sd15_v5p_128": ("v5p:4x4x8", sd15(256)),
    "sdxl_v5e_4": ("v5e:2x2", sdxl(4)),
    "sdxl_v5e_256": ("v5e:16x16", sdxl(256)),
    "sdxl_v6e_256": ("v6e:16x16", sdxl(256)),
    "sdxl_v5p_128": ("v5p:4x4x8", sdxl(128)),
}


def main(argv: list[str] | None = None) -> None:
    """Compiles what is not there, and prints each plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    for case in parser.parse_args(argv).cases:
        file = RESULTS / f"{case}.json"
        if file.is_file():
            found = json.loads(file.read_text())
        else:
            topology, given = CASES[case]
            config = hate.get_config(given["base"])
            config.dtype, config.accumulation = "bfloat16", 1
            config.batch_size, config.remat = given["batch_size"], given["remat"]
            found = plan.of_training(config, topology) | {"machine": machine()}
            RESULTS.mkdir(parents=True, exist_ok=True)
            if found["fits"]:
                plan.draw(found, file.with_suffix(".png"))
            write_file(file, (json.dumps(found, indent=1) + "\n").encode())
        print("\n".join([f"== {case}", *plan.lines(found), f"in {file}"]), flush=True)


if __name__ == "__main__":
    run_main(main)
