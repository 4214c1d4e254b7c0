"""Merges safety experts into one LoRA.

    python launch/merge.py --experts hate.safetensors violence.safetensors --model emoji \
        --out merged.safetensors
    python launch/merge.py --experts A B C --method ties --density 0.3 --rank 8 --out FILE
    python launch/merge.py --recipe merge.yaml  # the same options, by name, in a file
    safetydpo merge ...  # from the installed package

Co-Merge gives each output of a layer to the expert that is the most active there. For that it
draws with the base model, once; stopped, it goes on by the same command. What it counts is kept
beside the result, so that merging again with other options takes no model:
--stats OUT.stats.safetensors. Beside the merged LoRA, which
diffusers loads, it writes a picture of who won what and how much the experts have in common.

--distill 2000 trains what was merged, for so many steps, to answer each category's prompts as its
expert does and safe ones as the base. It takes the model and prompts, and goes on where it was
stopped.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import add_drawing_arguments, add_dtype_argument, local_path
from safetydpo_jax.errors import run_main
from safetydpo_jax.host_memory import use_huge_pages


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line, over a recipe's values; argparse exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE.yaml", help="these options, by name")
    parser.add_argument("--experts", nargs="+", metavar="FILE", help="LoRA files of one base")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each expert (1)")
    parser.add_argument("--method", default="co_merge", help="co_merge, average, ties, ...")
    parser.add_argument("--rank", type=int, help="of the result (the highest of the experts')")
    parser.add_argument("--scale", type=float, default=1.0, help="of the result (1)")
    parser.add_argument("--density", type=float, help="share of entries kept: ties, dare, ...")
    parser.add_argument("--sharpness", type=float, help="of co_merge_soft's votes")
    parser.add_argument(
        "--category_weights", nargs="+", metavar="NAME=X", help="of the votes under its prompts (1)"
    )
    parser.add_argument(
        "--band_weights", nargs="+", type=float, help="of votes by timestep, from noisy to clean"
    )
    parser.add_argument("--preservation", type=float, help="of harmless inputs: regmean (1)")
    parser.add_argument("--ridge", type=float, help="against rare inputs: regmean (0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")
    parser.add_argument("--stats", type=Path, metavar="FILE", help="what was counted before")
    parser.add_argument("--model", help="the base: as launch/sample.py takes it")
    parser.add_argument("--model_config", default="", help="what such a file is")
    add_dtype_argument(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE.csv", help="columns category,prompt")
    parser.add_argument(
        "--num_prompts",
        type=int,
        metavar="N",
        help="the first N of each category (all of the table's; 16 where emoji makes them)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="of the drawing, for votes and --distill (20)"
    )
    add_drawing_arguments(parser)
    parser.add_argument(
        "--trajectory",
        choices=("base", "experts"),
        help="who draws, for votes: the base (default), or each expert its category's prompts",
    )
    parser.add_argument("--batch_size", type=int, help="prompts at a time, for votes (8)")
    parser.add_argument(
        "--distill", type=int, default=0, metavar="STEPS", help="teach the result by the experts"
    )
    parser.add_argument("--distill_rate", type=float, help="its learning rate (0.002)")
    parser.add_argument(
        "--distill_preservation", type=float, help="weight of safe prompts in it (10)"
    )
    parser.add_argument("--distill_batch_size", type=int, help="its rows (32)")
    parser.add_argument("--out", type=local_path, metavar="FILE", help="the merged .safetensors")
    first = parser.parse_args(argv)
    if first.recipe:
        from safetydpo_jax.merge.recipe import read_recipe

        known = {action.dest: action for action in parser._actions}
        values = read_recipe(first.recipe, known)
        if first.experts and not first.weights:
            values.pop("weights", None)  # they are those of the recipe's own experts
        parser.set_defaults(**values)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and merges.

    Raises:
      UserError: an input that is wrong.
    """
    arguments: Any = parse_arguments(argv)
    from safetydpo_jax.merge.command import run  # here, so that a wrong command is told at once

    run(arguments, progress=lambda line: print(line, flush=True))


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
