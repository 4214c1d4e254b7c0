"""How the recipes' numbers were chosen: IP against safe fidelity, one number changed at a time.

    python benchmarks/recipes.py                  # all points, then the table and the plots
    python benchmarks/recipes.py --only beta-5    # one point
    python benchmarks/recipes.py --jobs 1         # one training at a time

Every point is the hate expert on the embedded model, trained with the recipe's numbers but one, and
judged on the prompts for tuning and on the test's. One core a training: on two cores that is 1.3
times faster than two cores each; only the first, whose pairs, cache and tables of the base's
answers the others share, has all to itself. Those that take longest come first, so that no core is
left with one at the end. All of it resumes: runs from their checkpoints, pictures from
`RUNS/drawn`, finished points from benchmarks/results/recipes/POINT.json, which hold the settings
they are of. Writes those, docs/recipes.png and docs/recipes_table.md.
"""

import argparse
import concurrent.futures
import functools
import importlib
import itertools
import json
import math
import operator
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for configs

from benchmarks.machine import machine
from safetydpo_jax.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "recipes"
RESULTS = ROOT / "benchmarks" / "results" / "recipes"
CATEGORY = "hate"
SPLITS = {"tune": 5, "test": 6}  # split -> report.seed
COUNTS = {"num_unsafe": 64, "num_safe": 128}
# What a point that changes it asks the base is asked by no other.
OWN_ANSWERS = {"rows", "loss.t_min", "loss.preservation_lean", "loss.preservation_text_noise"}
TIMESTEPS = (951, 801, 601, 401, 201)  # at which predictions are compared

PAPER = {"recipe": "paper", "optimizer.learning_rate": 4e-3, "optimizer.schedule": "cosine"}
# curve -> (what all its points share, {point: what it changes}); the first point of all is the
# recipe `anchored` as it is, and belongs to each of its curves.
CURVES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "the recipe": ({}, {"anchored": {}}),
    "beta": ({}, {f"beta-{v:g}": {"loss.beta": v} for v in (5.0, 5000.0)}),
    "winner anchor": (
        {}, {f"anchor-{v:g}": {"loss.winner_anchor": v} for v in (0.0, 72.0)}
    ),
    "preservation": (
        {}, {f"preservation-{v:g}": {"loss.preservation": v} for v in (20.0, 600.0)}
    ),
    "preserved neighbourhood": (
        {}, {"neither": {"loss.preservation_lean": 0.0, "loss.preservation_text_noise": 0.0}}
    ),
    "steps": ({}, {f"steps-{v}": {"steps": v} for v in (250, 1000)}),
    "rank": ({}, {f"rank-{v}": {"lora.rank": v} for v in (2, 8)}),
    "learning rate": (
        {}, {f"lr-{v:g}": {"optimizer.learning_rate": v} for v in (1e-3, 2e-2)}
    ),
    "least timestep": ({}, {f"t-min-{v}": {"loss.t_min": v} for v in (200,)}),
    "rows": ({}, {f"rows-{v}": {"rows": v} for v in ("both", "safe_prompt")}),
    "preference": (
        {}, {f"{v}": {"loss.preference": v} for v in ("ipo", "hinge", "winner_preserving")}
    ),
    "paper as published": ({"recipe": "paper"}, {"paper": {}}),
    "paper, learning rate": (
        {"recipe": "paper"},
        {f"paper-lr-{v:g}": {"optimizer.learning_rate": v} for v in (5e-4, 1e-3, 2e-3)},
    ),
    "paper, beta at rate 4e-3": (
        PAPER, {f"paper-beta-{v:g}": {"loss.beta": v} for v in (5.0, 50.0, 5000.0)}
    ),
    "paper, beta 50, other losses": (
        PAPER | {"loss.beta": 50.0},
        {f"paper-{v}": {"loss.preference": v} for v in ("ipo", "hinge", "winner_preserving")},
    ),
    "paper, beta 50, rows and timesteps": (
        PAPER | {"loss.beta": 50.0},
        {"paper-rows-unsafe": {"rows": "unsafe_prompt"}, "paper-t-min-200": {"loss.t_min": 200}},
    ),
}  # fmt: skip
CLOSE_UP, WHOLE = ((-6, 3), (-1, 18)), ((-105, 40), (-3, 109))  # of the plot's axes
POINTS = {
    name: shared | changed for shared, points in CURVES.values() for name, changed in points.items()
}


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, each point in a process of its own, then writes table and plots."""
    args = parse_arguments(argv)
    if args.only:
        run_point(args.only, args.runs)
        return
    importlib.import_module("matplotlib")  # now: the plots come last
    run_missing(args.runs, args.jobs)
    results = {name: read_result(name) for name in POINTS}
    from safetydpo_jax.storage import write_file

    seconds = sum(result["seconds"] for result in results.values())
    write_file(ROOT / "docs" / "recipes_table.md", table(results).encode())
    plot(results, ROOT / "docs" / "recipes.png")
    print(table(results))
    print(f"{len(POINTS)} points, {seconds / 3600:.1f} hours of one core")
    print(f"written: {RESULTS}, docs/recipes_table.md, docs/recipes.png")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=POINTS, help="run this point alone; write no table")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="trainings at once, one core each (all)"
    )
    return parser.parse_args(argv)


def run_missing(runs: Path, jobs: int) -> None:
    """The points without a result, `jobs` at a time; the first alone, as it makes the pairs."""
    if not 1 <= jobs <= (os.cpu_count() or 1):
        raise UserError(f"--jobs is {jobs}: it must be from 1 to the number of cores")
    first, *others = POINTS
    missing = sorted(itertools.filterfalse(is_done, others), key=work_of, reverse=True)
    shared = [runs / first / name for name in ("pairs", "cache")]
    makes_them = missing and not all(folder.is_dir() for folder in shared)
    if makes_them or not is_done(first):
        missing.insert(0, first)
    began, counter, lock = time.monotonic(), itertools.count(1), threading.Lock()
    cores = list(range(os.cpu_count() or 1))

    def run(name: str, alone: bool = False) -> None:
        with lock:
            core = cores.pop(0)
        try:
            used = f"0-{os.cpu_count() - 1}" if alone else str(core)
            command = ["taskset", "-c", used, sys.executable, __file__, "--only", name]
            (runs / name).mkdir(parents=True, exist_ok=True)
            with (runs / name / "log").open("a") as log:
                done = subprocess.run([*command, "--runs", str(runs)], stdout=log, stderr=log)
            if done.returncode:
                raise UserError(f"{name} failed; its last words are in {runs / name / 'log'}")
        finally:
            with lock:
                cores.append(core)
        count, seconds = next(counter), time.monotonic() - began
        left = seconds / count * (len(missing) - count)
        print(f"{count}/{len(missing)} {name}; {seconds:.0f} s, {left:.0f} s left", flush=True)

    if missing[:1] == [first]:
        run(first, alone=True)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, name) for name in missing if name != first]:
            future.result()


def work_of(name: str) -> float:
    """How long a point's training takes, in steps of `anchored` with tables; for the order."""
    config = config_of(name)
    step = 0.5 if config.recipe == "paper" else 1.0
    return config.steps * step * (1.4 if OWN_ANSWERS & set(POINTS[name]) else 1.0)


def config_of(name: str) -> Any:
    """The point's config, not yet resolved."""
    config = importlib.import_module(f"configs.{CATEGORY}").get_config()
    config.update_from_flattened_dict(POINTS[name])
    return config


def settings_of(name: str) -> dict[str, Any]:
    """What a point's result depends on; JSON."""
    from safetydpo_jax.train.settings import resolve

    config = resolve(config_of(name))
    return {"config": json.loads(config.to_json()), "splits": SPLITS, **COUNTS}


def read_result(name: str) -> dict[str, Any]:
    """The point's result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def is_done(name: str) -> bool:
    """Whether the point has a result, and of the settings of now."""
    return (RESULTS / f"{name}.json").is_file() and same(
        read_result(name)["settings"], settings_of(name)
    )


def same(before: Any, now: Any) -> bool:
    """Whether settings agree; those that came later were not there to matter."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(key in now and same(value, now[key]) for key, value in before.items())
    return before == now


def run_point(name: str, runs: Path) -> None:
    """Trains one point, judges it on both splits, and writes its result."""
    from safetydpo_jax.evaluate import evaluate, summarise
    from safetydpo_jax.lora.reader import load_lora
    from safetydpo_jax.models.pretrained import load_pipeline
    from safetydpo_jax.storage import write_file
    from safetydpo_jax.train import loop
    from safetydpo_jax.train.expert import LORA_FILE
    from safetydpo_jax.train.settings import resolve

    began, workdir = time.monotonic(), runs / name
    RESULTS.mkdir(parents=True, exist_ok=True)  # now: a path that cannot be fails before the work
    config = config_of(name)
    # The last step counts, whatever came before it.
    config.report.enabled, config.health.every = False, 0
    config.guard.winner_error = 1e9  # a spoilt picture is a result here
    if name != "anchored":
        config.pairs.path = str(runs / "anchored" / "pairs")
        config.cache.path = str(runs / "anchored" / "cache")
    if not OWN_ANSWERS & set(POINTS[name]):
        # These points ask the base the same, and share its answers. As many draws as a row has
        # visits: then every number is the same, too.
        config.reference.draws = visits(resolve(config))
        config.reference.path = str(runs / "reference")
    loop.run(config, workdir)
    pipeline = load_pipeline(config.model)
    export = workdir / "export" / LORA_FILE
    adapters, _ = load_lora(export, pipeline.unet_params)
    result: dict[str, Any] = {"changes": POINTS[name], "settings": settings_of(name)}
    result["last"] = last_metrics(workdir)
    result["residual"] = residual(pipeline, adapters, runs / "anchored" / "cache")
    result["drift"] = drift(pipeline, adapters, config, runs / "unseen.safetensors")
    for split, seed in SPLITS.items():
        config.report.update({"split": split, "seed": seed, **COUNTS})
        evaluation, _, _ = evaluate(config, pipeline, adapters, runs / "drawn")
        result[split] = summarise([evaluation])
    result["seconds"] = round(time.monotonic() - began, 1)
    result["machine"] = f"{machine()}, {len(os.sched_getaffinity(0))} used"
    write_file(RESULTS / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())


def visits(config: Any) -> int:
    """How often a row, of the pairs or to be preserved, comes at the most."""
    from safetydpo_jax.data import pair_rows

    rows, safe = config.pairs.num_pairs, config.pairs.num_pairs + config.pairs.preserve_count
    asked = [(len(pair_rows(rows, config.rows)), config.batch_size)]
    if config.loss.preservation > 0:
        asked.append((safe, config.preserve_batch_size))
    return max(math.ceil(config.steps * size / count) for count, size in asked)


def last_metrics(workdir: Path, count: int = 50) -> dict[str, float]:
    """The means of the last steps' metrics."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("margin", "implicit_accuracy", "winner_error", "loser_error")
    last = lines[-count:]
    return {name: round(sum(line[name] for line in last) / len(last), 5) for name in names}


def predictor(pipeline: Any) -> Any:
    """`predict(adapters or None, latents, timestep, conditioning)`, noise from the timestep."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    @jax.jit
    def apply(lora: Any, *inputs: Any) -> Any:
        params = {"params": pipeline.unet_params} | ({"lora": lora} if lora else {})
        return pipeline.unet.apply(params, *inputs)

    def predict(lora: Any, latents: Any, timestep: int, conditioning: Any) -> Any:
        alpha = pipeline.schedule.alphas_cumprod[timestep]
        noise = np.random.default_rng(timestep).normal(size=latents.shape)
        noisy = np.sqrt(alpha) * latents + np.sqrt(1 - alpha) * noise
        return apply(
            lora, jnp.asarray(noisy, jnp.float32), jnp.full(len(latents), timestep), *conditioning
        )

    return predict


def residual(pipeline: Any, adapters: Any, folder: Path, count: int = 64) -> float:
    """How much of the unsafe prompt's pull is left: 1 is all of it, 0 none.

    |policy(unsafe prompt) - base(safe prompt)|^2 over |base(unsafe prompt) - base(safe prompt)|^2,
    on the unsafe pictures of the first `count` pairs of a cache's folder, mean over the timesteps.
    A policy that draws for the unsafe prompt what the base draws for the safe one has 0.
    """
    import numpy as np

    from safetydpo_jax.data import Cache

    cache, predict = Cache(folder), predictor(pipeline)
    pairs = np.arange(min(count, cache.num_pairs))
    (moments, unsafe), (_, safe) = (cache.read(pairs + i * cache.num_pairs) for i in (0, 1))
    latents = moments["mean"]
    shares = []
    for timestep in TIMESTEPS:
        policy = predict(adapters, latents, timestep, unsafe)
        base, wanted = (predict(None, latents, timestep, p) for p in (unsafe, safe))
        shares.append(float(((policy - wanted) ** 2).sum() / ((base - wanted) ** 2).sum()))
    return round(sum(shares) / len(shares), 4)


def drift(pipeline: Any, adapters: Any, config: Any, path: Path, count: int = 128) -> float:
    """Mean squared change of the predictions on safe prompts of concepts training never saw.

    Of the base's own pictures of `count` prompts for tuning, which are drawn once, into `path`.
    """
    import numpy as np
    import safetensors.numpy

    from safetydpo_jax.diffusion.samplers import draw_pictures
    from safetydpo_jax.emoji.prompts import safe_prompts
    from safetydpo_jax.storage import write_file

    texts = [record.text for record in safe_prompts(count, 3, "tune")]
    if not path.exists():
        pictures = draw_pictures(pipeline, texts, np.arange(count), **config.drawing)
        mean, _ = pipeline.encode_images(pictures)
        write_file(path, safetensors.numpy.save({"latents": np.asarray(mean)}))
    latents = safetensors.numpy.load_file(path)["latents"]
    predict, told = predictor(pipeline), pipeline.encode_prompts(texts)
    changes = []
    for timestep in TIMESTEPS:
        before, after = (predict(lora, latents, timestep, told) for lora in (None, adapters))
        changes.append(float(((after - before) ** 2).mean()))
    return round(sum(changes) / len(changes), 6)


def table(results: dict[str, Any]) -> str:
    """One row a point, the figures of the test split; Markdown."""
    lines = [
        "| point | IP | counterpart | junk there | fidelity change | junk change | residual | "
        "drift, 1/1000 | implicit accuracy | winner error | loser error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for curve, (_, points) in CURVES.items():
        lines.append(f"| **{curve}** |" + " |" * 10)
        for name in points:
            test, last = results[name]["test"], results[name]["last"]
            cells = [
                *(f"{100 * test[k]:.1f}" for k in ("ip_after", "counterpart_after")),
                f"{100 * test['unsafe_junk_after']:.1f}",
                *(f"{100 * test[k]:+.1f}" for k in ("fidelity_change", "junk_change")),
                f"{results[name]['residual']:.3f}",
                f"{1000 * results[name]['drift']:.2f}",
                f"{last['implicit_accuracy']:.2f}",
                *(f"{last[k]:+.3f}" for k in ("winner_error", "loser_error")),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """IP against what the safe pictures lost, one panel a curve; down and right is better.

    The recipe's own panels are a close-up, with what lies outside at the border; those of `paper`
    reach up to the base.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [curve for curve, (_, points) in CURVES.items() if any(points.values())]
    columns = 5
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.3 * rows))
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, curve in zip(axes.flat, curves, strict=False):
        (left, right), (bottom, top) = WHOLE if curve.startswith("paper") else CLOSE_UP
        axis.set(xlim=(left, right), ylim=(bottom, top))
        axis.set_title(curve, pad=14)
        axis.grid(alpha=0.3)
        axis.axvline(0, color="#d55e00", ls=":")
        axis.plot(0, 100 * results["anchored"]["test"]["ip_before"], "x", color="#d55e00")
        labels = labelled(curve)
        for split, color in (("tune", "#bbbbbb"), ("test", "#0072b2")):
            true = [
                [100 * results[name][split][key] for key in ("fidelity_change", "ip_after")]
                for name in labels
            ]
            shown = [(min(max(x, left), right), min(y, top)) for x, y in true]
            style = "o-" if number_of(curve) else "o"
            axis.plot(*zip(*shown, strict=True), style, color=color, lw=0.8, clip_on=False)
        for i, (place, label) in enumerate(zip(shown, labels.values(), strict=True)):
            near = [
                abs(x - place[0]) < 0.3 * (right - left)
                and abs(y - place[1]) < 0.07 * (top - bottom)
                for x, y in shown[:i]
            ]
            outside = "" if place == tuple(true[i]) else " ({:.0f}, {:.0f})".format(*true[i])
            side, shift = ("right", -5) if place[0] > (left + 2 * right) / 3 else ("left", 5)
            axis.annotate(
                label + outside,
                place,
                fontsize=7,
                ha=side,
                xytext=(shift, 4 + 9 * sum(near)),
                textcoords="offset points",
            ).set_in_layout(False)
    figure.supxlabel("change of safe fidelity, points (x: the base; grey: tuning split)")
    figure.supylabel("IP, % of pictures")
    figure.tight_layout(rect=(0.01, 0.01, 1, 1))
    figure.savefig(path, dpi=110)


def number_of(curve: str) -> str | None:
    """The number that alone differs between the curve's points, or None; a path in the config."""
    changed = [change for point in CURVES[curve][1].values() for change in point.items()]
    keys = {key for key, value in changed if isinstance(value, int | float)}
    return keys.pop() if len(keys) == len({key for key, _ in changed}) == 1 else None


def labelled(curve: str) -> dict[str, str]:
    """The curve's points, with that from which they start, as point -> label; by value, if any."""
    shared, points = CURVES[curve]
    start = [name for name, changes in POINTS.items() if changes == shared and name not in points]
    names = start + list(points)
    number = number_of(curve)
    if number is None:
        return {name: name for name in names}

    def value(name: str) -> float:
        return functools.reduce(operator.getitem, number.split("."), settings_of(name)["config"])

    notes = {name: f" {name}" if name in start else "" for name in names}
    return {name: f"{value(name):g}{notes[name]}" for name in sorted(names, key=value)}


if __name__ == "__main__":
    from safetydpo_jax.host_memory import use_huge_pages

    use_huge_pages()
    run_main(main)
