"""What is to run on the rented machines: one of the package's own commands."""

import argparse
from collections.abc import Sequence

from safetydpo_jax.errors import UserError

# Exit codes after which the same command goes on: a process of the job is gone (75; 134 from JAX
# itself), SIGTERM as before a preemption (143), a kill (137). docs/several_hosts.md
RESTART = (75, 134, 137, 143)
_ALL_AT_ONCE = ("train",)


def parser(description: str) -> argparse.ArgumentParser:
    """Of a launcher's command line, with what all have: a name, restarts, the command."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--name", required=True, help="of the job")
    found.add_argument("--restarts", type=_restarts, default=50, help="at the most (50)")
    found.add_argument("--dry-run", action="store_true", help="print what would run, run nothing")
    found.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    return found


def _restarts(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of restarts, 0 or more")
    return int(text)


def add_slice(found: argparse.ArgumentParser) -> None:
    """Adds --topology and --spot."""
    found.add_argument("--topology", required=True, help="as launch/plan.py has it: v5e:4x4")
    found.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")


def command_of(words: Sequence[str]) -> list[str]:
    """The command of every process of a job, `safetydpo` left out.

    Args:
      words: as the user gives them after `--`: a subcommand and its arguments.

    Raises:
      UserError: there is none.
    """
    from safetydpo_jax.__main__ import COMMANDS

    name, *arguments = [word for word in words if word != "--"] or [""]
    if name not in COMMANDS:
        raise UserError(
            "say what to run after --, as -- train --config hate:sd15 --workdir gs://BUCKET/FOLDER "
            f"(not {name!r}; there are {', '.join(COMMANDS)})"
        )
    if name in _ALL_AT_ONCE and "--distributed" not in arguments:
        arguments.append("--distributed")
    return [name, *arguments]
