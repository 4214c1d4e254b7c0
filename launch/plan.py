"""Says before anything is rented whether a run fits on a TPU slice, and how fast it will be.

    python launch/plan.py --config configs/hate.py:sdxl --topology v6e:16x16
    python launch/plan.py --config configs/hate.py:sd15 --topology v5e:2x2 --config.batch_size=8
    python launch/plan.py --config configs/hate.py:sdxl --topology h100:8 --mfu 0.3
    safetydpo plan ...  # the same, from the installed package

The training step, and the programs that draw pictures and encode them before it, are compiled by
the TPU compiler (pip install 'safetydpo-jax[tpu]'), from shapes alone: no TPU and no weights are
needed, but minutes; --step-only leaves it at the step. --topology is v5e, v5p or v6e and its chips
along each axis; or a100, h100 or h200 and how many, for which nothing is compiled: the step's
products are counted, and done at the share of the peak that --mfu says (0.25). --json FILE writes
all figures, --picture FILE.png where the step's time goes; --price is what a chip costs an hour, by
default that of configs/prices.yaml. What was compiled is kept: the same plan is there at once the
next time.
"""

import json
import sys
from pathlib import Path

# For `configs`, and for the package if it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import pop_flag, pop_option, read_command_line, shipped
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.yaml_file import read_yaml

OPTIONS = ("--topology", "--json", "--picture", "--price", "--mfu")


def main() -> None:
    """Reads the command line, compiles, prints and writes."""
    given, argv = {}, sys.argv
    for name in OPTIONS:
        given[name], argv = pop_option(argv, name)
    step_only, argv = pop_flag(argv, "--step-only")
    config, _ = read_command_line(argv, __doc__)
    if not given["--topology"]:
        raise UserError("--topology is missing: give a slice, as --topology v5e:4x4")
    price = _price(given["--price"], given["--topology"])
    options = _assumed(given["--mfu"], given["--topology"])
    if (file := given["--picture"]) and not file.lower().endswith(".png"):
        raise UserError(f"--picture {file}: it is a PNG, so give it a name that ends in .png")

    from safetydpo_jax import plan
    from safetydpo_jax.storage import check_writable, write_file

    for name in ("--json", "--picture"):  # now, not after minutes
        if file := given[name]:
            if not Path(file).absolute().parent.is_dir():
                raise UserError(f"{name} {file}: there is no such folder")
            check_writable(Path(file))
    plan.use_cpu()
    found = plan.of_training(config, given["--topology"], price, passes=not step_only, **options)
    print("\n".join(["", *plan.lines(found)]))
    if file := given["--json"]:
        write_file(Path(file), (json.dumps(found, indent=1) + "\n").encode())
        print(f"written: {file}")
    if file := given["--picture"]:
        if found["fits"]:
            plan.draw(found, Path(file))
            print(f"written: {file}")
        else:
            why = "nothing was compiled" if found["fits"] is None else "it does not fit"
            print(f"{file}: no picture, as {why}")


def _assumed(given: str, topology: str) -> dict[str, float]:
    from safetydpo_jax.plan.gpus import gpus_of

    if not given:
        return {}
    if not gpus_of(topology):
        raise UserError(f"--mfu is for GPUs: a step on {topology} is compiled, and its MFU is said")
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"--mfu is {given!r}: give a share of the peak, above 0 and at most 1")
    return {"mfu": share}


def _price(given: str, topology: str) -> float:
    file = shipped("configs/prices.yaml")
    prices = read_yaml(file, "write it as a line each, v5e: 1.20")
    if not isinstance(prices, dict):
        raise UserError(f"{file}: it must have a line for each kind, as in v5e: 1.20")
    price = given or prices.get(topology.partition(":")[0], 0.0)
    try:
        return float(price)
    except (TypeError, ValueError):
        where = "--price" if given else str(file)
        raise UserError(f"{where}: {price!r} is no number of dollars") from None


if __name__ == "__main__":
    run_main(main)
