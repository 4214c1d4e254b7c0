r"""Has a language model write prompt pairs about a list of unsafe concepts.

    python launch/write_prompts.py --concepts concepts.csv --out prompts \
        --endpoint http://localhost:8000/v1 --model NAME
    python launch/write_prompts.py --concepts concepts.csv --out prompts --model FOLDER
    python launch/write_prompts.py ... --estimate --price 0.5 1.5  # dollars a million tokens
    safetydpo write_prompts ...  # from the installed package

The endpoint speaks OpenAI's chat protocol: vLLM, llama.cpp, JetStream, or a service, with its key
in OPENAI_API_KEY; without one the model is one of transformers, in PyTorch. concepts.csv has the
columns category,concept; a harm's YAML file will do, too. It writes one table of pairs a category,
which launch/generate.py draws; that, with configs/coprov2.py, does both. What is answered is kept:
the same command goes on after a kill. Needs `pip install 'safetydpo-jax[llm]'`; docs/pairs/
writing.md says more. Prompts are never shown.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetydpo_jax.command_line import local_path
from safetydpo_jax.errors import run_main


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and writes.

    Raises:
      UserError: an input that is wrong, or an endpoint that does not answer.
    """
    from safetydpo_jax.data.writing import Settings, estimate, said, write_prompts

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", required=True, type=Path, help="CSV or YAML")
    parser.add_argument("--out", required=True, type=local_path, help="the folder for the tables")
    parser.add_argument("--endpoint", dest="url", default="", help="its address, up to /v1")
    parser.add_argument(
        "--model",
        required=True,
        help="its name at the endpoint; without one, a model of transformers: folder or hub id",
    )
    parser.add_argument("--template", type=Path, default=Settings.template, help="of a request")
    parser.add_argument(
        "--judge_template",
        type=Path,
        default=Settings.judge_template,
        help="of a request for verdicts on what was written",
    )
    parser.add_argument("--no_judge", dest="judge", action="store_false", help="ask for none")
    for name, help_text in (
        ("per_concept", "pairs of each concept"),
        ("per_request", "pairs in one request"),
        ("per_category", "pairs of each category at most, 0 for all"),
        ("attempts", "at a request whose answers cannot be used"),
        ("concurrency", "requests at a time"),
        ("requests_per_minute", "at most, 0 for no limit"),
        ("timeout", "seconds of one request"),
        ("temperature", "of the model"),
    ):
        default = getattr(Settings, name)
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{help_text} ({default})"
        )
    parser.add_argument("--estimate", action="store_true", help="say what it would take, and stop")
    parser.add_argument(
        "--price", type=float, nargs=2, metavar=("IN", "OUT"), help="dollars a million tokens"
    )
    options = vars(parser.parse_args(argv))
    only_estimate, price = options.pop("estimate"), options.pop("price")
    settings = Settings(**options)
    expected = estimate(settings)
    told = said(settings, expected)
    if price:
        tokens = (expected["prompt_tokens"], expected["answer_tokens"])
        told += f", {sum(n * x for n, x in zip(tokens, price, strict=True)) / 1e6:.2f} dollars"
    if settings.requests_per_minute:
        asked = expected["requests"] * (2 if settings.judge else 1)
        minutes = asked / settings.requests_per_minute
        told += f", {minutes:.0f} minutes at the least"
    print(told, flush=True)
    if only_estimate:
        return
    from safetydpo_jax.train.workdir import lock_workdir

    with lock_workdir(settings.out):
        report = write_prompts(settings, progress=lambda line: print(line, flush=True))
    for name, count in report["categories"].items():
        print(
            f"{name:18}{count['kept']} pairs of {count['written']}: {count['left_out']} left out, "
            f"{count['duplicates']} near-duplicates, {count['beyond']} more than wanted"
        )
    if unanswered := len(report["unanswered_ids"]):
        print(f"unanswered        {unanswered} requests: the same command asks them again")
    print(f"tables            {settings.out}: a folder a category; report.json")
    print(
        "to draw           safetydpo generate --config own:sd15 --config.model=MODEL "
        f"--config.harm={settings.out}/CATEGORY --workdir runs/CATEGORY"
    )


if __name__ == "__main__":
    run_main(main)
