"""How many prompts Co-Merge's votes take until the winners stay the same.

    python benchmarks/merge/votes.py             # 4 to 64 prompts a category, seed 0's experts

Two sets of so many prompts each, that share none, vote on the winner of every output; what they
agree on says how far a merge by either depends on the prompts. Writes
benchmarks/results/merge/votes.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for configs and benchmarks

from benchmarks.machine import machine
from benchmarks.merge.report import RESULTS
from benchmarks.merge.train import lora
from safetydpo_jax.errors import run_main
from safetydpo_jax.harm import CATEGORIES
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.merge import opened_experts
from safetydpo_jax.merge.activity import TRAJECTORIES, count_votes
from safetydpo_jax.merge.prompts import emoji_prompts
from safetydpo_jax.merge.statistics import Statistics
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file


def main(argv: list[str] | None = None) -> None:
    """Counts prompt after prompt, and reads off the agreement at each number of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--seed", type=int, default=0, help="of the experts' training")
    parser.add_argument("--trajectory", choices=TRAJECTORIES, default="base")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args(argv)
    pipeline = load_pipeline("emoji")
    found: list[dict[str, Any]] = []
    with opened_experts([lora(c, args.seed) for c in CATEGORIES], pipeline.unet_params) as experts:
        before = 0
        total: Statistics | None = None
        for count in sorted(args.counts):
            # The first prompts of a longer list are those of a shorter one: only new ones vote.
            prompts, categories = emoji_prompts(2 * count, seed=0)
            new = [i for i in range(len(prompts)) if i % (2 * count) >= 2 * before]
            votes = count_votes(
                pipeline,
                experts,
                [prompts[i] for i in new],
                [categories[i] for i in new],
                seed=count,
                batch_size=args.batch_size,
                sampler="dpmsolver++",
                num_steps=12,
                guidance_scale=4.0,
                trajectory=args.trajectory,
            )
            total, before = votes if total is None else added(total, votes), count
            found.append({"prompts": count, **agreement(total)})
            print(found[-1], flush=True)
    result = {
        "machine": machine(),
        "seed": args.seed,
        "trajectory": args.trajectory,
        "prompts": "of each category and half",
        "found": found,
    }
    path = RESULTS / "votes.json"
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {path}")


def added(one: Statistics, other: Statistics) -> Statistics:
    """The votes of both, on the outputs."""
    for layer, counts in other.outputs.items():
        one.outputs[layer] = one.outputs[layer] + counts
    return one


def agreement(statistics: Statistics) -> dict[str, float]:
    """The shares of outputs and of votes on which both halves agree.

    Returns:
      outputs: the share of outputs with the same winner.
      lead: of all outputs, the mean share of votes by which the winner leads the second.
      close: of the outputs on which the halves differ, the same.
    """
    leads = []
    for counts in statistics.outputs.values():
        votes = counts.sum((0, 1, 2))
        shares = np.sort(votes / np.maximum(votes.sum(0), 1), axis=0)
        leads.append(shares[-1] - shares[-2])
    lead, agreed = np.concatenate(leads), np.concatenate(list(statistics.settled().values()))
    differ = lead[~agreed]
    return {
        "outputs": round(statistics.agreement(), 4),
        "lead": round(float(lead.mean()), 4),
        "close": round(float(differ.mean()) if len(differ) else 0.0, 4),
    }


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
