"""Trains a safety expert: pairs, cache, DPO training, export, report.

    python launch/train.py --config configs/hate.py
    python launch/train.py --config configs/hate.py --config.steps=800 --workdir runs/longer
    safetydpo train --config hate  # the first, from the installed package
    python launch/train.py --config configs/hate.py --distributed  # in each process of a job

With --distributed all processes train one expert together: on every worker of a TPU pod, as Slurm,
Open MPI or Kubernetes start them, or with JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and
JAX_PROCESS_ID set. Every value of the config can be set as --config.KEY=VALUE. The same command
goes on after a kill. With --workdir gs://BUCKET/FOLDER it does so on another machine, too.
"""

import contextlib
import sys
from pathlib import Path

# For `configs`, and for the package if it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import pop_flag, read_command_line, shown_command
from safetydpo_jax.errors import run_main
from safetydpo_jax.host_memory import use_huge_pages


def main() -> None:
    """Reads the command line and runs."""
    distributed, argv = pop_flag(sys.argv, "--distributed")
    config, workdir = read_command_line(argv, __doc__, bucket=True)
    command = shown_command("safetydpo train", sys.argv[1:])
    # Here, so that a wrong command is told at once.
    from safetydpo_jax.processes import job
    from safetydpo_jax.train.loop import run

    with job() if distributed else contextlib.nullcontext():
        run(config, workdir, command=command)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
