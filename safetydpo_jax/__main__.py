"""The console command `safetydpo`: the launch scripts as its subcommands.

`safetydpo train ...` is `python launch/train.py ...`, and works from an installed wheel too.
"""

import ast
import runpy
import sys

from safetydpo_jax import __version__
from safetydpo_jax.command_line import ROOT
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.host_memory import use_huge_pages

LAUNCH = ROOT / "launch"
COMMANDS = (
    "train",
    "plan",
    "write_prompts",
    "generate",
    "import_pairs",
    "cache",
    "sample",
    "merge",
    "export",
    "pretrain",
)  # scripts in launch/; the others are maintainers' or start jobs on clouds


def main() -> None:
    """Runs the script that the command line names and exits, as the script itself would."""
    run_main(_run)


def _run() -> int | None:
    """Gives the script's `main` the rest of the command line.

    Raises:
      UserError: there is no such subcommand.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return None
    if name == "--version":
        print(f"safetydpo {__version__}")
        return None
    if name not in COMMANDS:
        raise UserError(f"safetydpo has no command {name!r}; there are {', '.join(COMMANDS)}")
    use_huge_pages()
    sys.argv = [f"safetydpo {name}", *arguments]
    return runpy.run_path(str(LAUNCH / f"{name}.py"))["main"]()


def _help() -> str:
    """The subcommands, each with the first line of its docstring, which is read but not run."""
    lines = ["usage: safetydpo COMMAND ...", "       safetydpo --version", ""]
    for name in COMMANDS:
        script = ast.parse((LAUNCH / f"{name}.py").read_text(encoding="utf-8"))
        summary = (ast.get_docstring(script) or "").partition("\n")[0]
        lines.append(f"  {name:15}{summary}")
    return "\n".join([*lines, "", "safetydpo COMMAND --help tells how to use it."])


if __name__ == "__main__":
    main()
