r"""Starts a job on the GPUs of a Slurm cluster: a process for each, requeued when one is lost.

    python launch/slurm.py --name hate --nodes 2 --time 12:00:00 \
        -- train --config hate:sdxl --config.pairs.path=/shared/pairs/hate \
        --config.batch_size=16 --config.accumulation=1 --workdir /shared/runs/hate

After -- comes a command of `safetydpo`, which runs in this environment and folder on every node.
--dry-run prints the batch script and does not send it to sbatch. Before its time is over, or it is
preempted, the job is told to stop, saves its step and is queued again, to go on from there.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package

from safetydpo_jax.errors import run_main
from safetydpo_jax.pods import RESTART, Shell, command_of, parser

GRACE_SECONDS = 300  # before the end: an evaluation, a step and its checkpoint
SCRIPT = """#!/bin/bash
{options}
srun --kill-on-bad-exit=0 --cpus-per-task={cpus} {program}
code=$?
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
  case $code in {codes}) scontrol requeue "$SLURM_JOB_ID" ;; esac
fi
exit $code
"""


def main() -> None:
    """Reads the command line, prints the batch script and submits it."""
    reader = parser(__doc__ or "")
    reader.add_argument("--nodes", type=int, default=1, help="how many (1)")
    reader.add_argument("--gpus", type=int, default=8, help="of each node (8)")
    reader.add_argument("--cpus", type=int, default=8, help="cores for each GPU (8)")
    reader.add_argument("--time", help="at the most, until it is queued again: 12:00:00")
    reader.add_argument("--partition", help="the cluster's own by default")
    reader.add_argument("--account", help="the user's own by default")
    args = reader.parse_args()
    Shell(args.dry_run).run("sbatch", given=script(args))


def script(args: argparse.Namespace) -> str:
    """The batch script. JAX finds out from Slurm who is who, if each GPU has a process."""
    options = {
        "job-name": args.name,
        "nodes": args.nodes,
        "ntasks-per-node": args.gpus,
        "gpus-per-node": args.gpus,
        "cpus-per-task": args.cpus,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "signal": f"TERM@{GRACE_SECONDS}",
        "output": f"{args.name}-%j.log",
        "open-mode": "append",  # of a job that is queued again
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    program = shlex.join([sys.executable, "-m", "safetydpo_jax", *command_of(args.command)])
    codes = "|".join(map(str, RESTART))
    return SCRIPT.format(
        cpus=args.cpus,  # srun no longer takes it from the job, since Slurm 22.05
        options="\n".join([*lines, "#SBATCH --requeue"]),
        program=program,
        codes=codes,
        restarts=args.restarts,
    )


if __name__ == "__main__":
    run_main(main)
