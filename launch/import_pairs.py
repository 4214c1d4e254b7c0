"""Makes pair sets for training from a pair set in another format, such as CoProV2's.

    python launch/import_pairs.py --input CoProV2 --out pairs
    python launch/import_pairs.py --input FOLDER --format pickapic --category violence --out pairs
    safetydpo import_pairs ...  # from the installed package

Formats (docs/pairs.md): coprov2 (its tables with a zip, a folder or the hub's parquet files),
folder (pairs.csv and pictures), pickapic (parquet) and webdataset (tar). It writes one pair set a
category, for --config.pairs.path=pairs/hate, holds some pairs back in pairs/validation, and lists
by id what it had to skip. Every picture is decoded before anything is written. The same command
goes on after a kill.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import local_path
from safetydpo_jax.errors import run_main


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and imports.

    Raises:
      UserError: an input that is wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, type=Path, help="the folder that has the pairs")
    parser.add_argument(
        "--out", required=True, type=local_path, help="the folder for the pair sets"
    )
    parser.add_argument("--format", default="", help="what it is (by default what it looks like)")
    parser.add_argument("--category", default="", help="of pairs of which the input names none")
    parser.add_argument(
        "--sets",
        nargs="+",
        default=(),
        metavar="NAME",
        help="categories to write, or all: every pair in one set (every category)",
    )
    parser.add_argument(
        "--validation", type=float, default=0.05, help="share of the pairs held back (0.05)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at what would be skipped")
    parser.add_argument("--reveal", action="store_true", help="show unsafe pictures unblurred")
    arguments = parser.parse_args(argv)
    from safetydpo_jax.data.import_pairs import import_pairs  # here: --help needs none of it
    from safetydpo_jax.train.workdir import lock_workdir

    with lock_workdir(arguments.out):
        counts = import_pairs(
            arguments.input,
            arguments.out,
            kind=arguments.format,
            category=arguments.category,
            sets=arguments.sets,
            validation=arguments.validation,
            strict=arguments.strict,
            reveal=arguments.reveal,
            progress=lambda line: print(line, flush=True),
        )
    print(f"pair sets     {arguments.out}: {', '.join(f'{n} {c}' for n, c in counts.items())}")
    print(f"report        {arguments.out}: report.json, pairs.png")
    first = arguments.out / next(iter(counts))
    print(f"to train      safetydpo train --config NAME:sd15 --config.pairs.path={first}")


if __name__ == "__main__":
    run_main(main)
