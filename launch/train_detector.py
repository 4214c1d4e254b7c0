"""Trains the embedded world's detector on fresh renders and junk, and measures it.

    python launch/train_detector.py

takes about 12 minutes on one CPU core of its own and writes
safetydpo_jax/emoji/detector.safetensors and detector.json (what was measured) beside it. Stopped in
between, the same command goes on from the last snapshot in --workdir. Picture i of the stream is a
function of (seed, i).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

from safetydpo_jax.emoji.concepts import INDEX, NONE
from safetydpo_jax.emoji.detector import (
    PLACES,
    WEIGHTS,
    Detector,
    DetectorNet,
    concept_digest,
    fold_norms,
    load_params,
    save_params,
)
from safetydpo_jax.emoji.junk import JUNK, degrade
from safetydpo_jax.emoji.scenes import SIDE, Scene, pick, render, sample_scene
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.models.autoencoder import to_pixels

JUNK_SHARE = 0.35
HARD_JUNK = ("blend", "crossfade", "crossfade", "smear")  # drawn so much more often
DEGRADED_SHARE = 0.5
MEASURE_SEED = 1_000_000  # of pictures that no training run sees


def label(scene: Scene | None) -> np.ndarray:
    """What each place may answer, bool (PLACES, PLACES, concepts + 1).

    The place of a pictogram's centre must name it, the places around may or may say none, all
    others (all of junk, scene None) must say none.
    """
    allowed = np.zeros((PLACES, PLACES, NONE + 1), bool)
    allowed[..., NONE] = True
    if scene is None:
        return allowed
    concepts = [INDEX[name] for name in scene.concepts]
    centres = [(int(p.y * PLACES / SIDE), int(p.x * PLACES / SIDE)) for p in scene.placements]
    for concept, (row, column) in zip(concepts, centres, strict=True):
        allowed[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2, concept] = True
    # After all surroundings: a centre may lie beside another one.
    for concept, centre in zip(concepts, centres, strict=True):
        allowed[centre] = np.arange(NONE + 1) == concept
    return allowed


def training_picture(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One uint8 picture, a scene or junk, and its label."""
    rng = np.random.default_rng((seed, index))
    if rng.random() < JUNK_SHARE:
        return JUNK[pick(rng, [*JUNK, *HARD_JUNK])](rng), label(None)
    scene = sample_scene(rng)
    picture = render(scene)
    if rng.random() < DEGRADED_SHARE:
        picture = degrade(picture, rng)
    return picture, label(scene)


def training_batch(seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures and labels of a step."""
    pairs = [training_picture(seed, step * size + i) for i in range(size)]
    pictures, labels = zip(*pairs, strict=True)
    return np.stack(pictures), np.stack(labels)


def make_update(optimizer: optax.GradientTransformation):
    """The jitted step: (variables, opt_state, pictures, labels) -> (variables, opt_state, loss)."""

    def loss_of(params: Any, averages: Any, pictures: jax.Array, allowed: jax.Array):
        logits, changed = DetectorNet(training=True).apply(
            {"params": params, "batch_stats": averages},
            to_pixels(pictures),
            mutable=["batch_stats"],
        )
        surprise = jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(
            logits, axis=-1, where=allowed
        )
        # The sum over places: one wrong place is enough to get a picture wrong.
        return surprise.sum((1, 2)).mean(), changed["batch_stats"]

    def update(variables: Any, state: Any, pictures: jax.Array, allowed: jax.Array):
        (loss, averages), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            variables["params"], variables["batch_stats"], pictures, allowed
        )
        updates, state = optimizer.update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": averages}, state, loss

    return jax.jit(update, donate_argnums=(0, 1))


def save_snapshot(path: Path, step: int, run: str, tree: Any) -> None:
    """Writes the leaves of (variables, optimiser state) and the step, all or nothing."""
    leaves = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(leaves, path.with_suffix(".part"), {"step": str(step), "run": run})
    os.replace(path.with_suffix(".part"), path)


def load_snapshot(path: Path, run: str, tree: Any) -> tuple[int, Any]:
    """Reads a snapshot of the same run.

    Raises:
        UserError: the snapshot is of a run with other arguments.
    """
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        if metadata["run"] != run:
            raise UserError(
                f"{path}: a snapshot of another run ({metadata['run']}, now {run}); choose "
                "another --workdir"
            )
        leaves = [jnp.asarray(file.get_tensor(key)) for key in sorted(file.keys())]
    return int(metadata["step"]), jax.tree.unflatten(jax.tree.structure(tree), leaves)


def measure(detector: Detector, count: int) -> dict[str, Any]:
    """Shares of right answers on `count` new pictures of each sort, of held-out combinations.

    A scene is right when exactly its concepts are named, junk when none is.
    """
    scenes = {}
    for clean, sort in ((True, "clean"), (False, "degraded")):
        for number in (1, 2):
            shown, pictures = [], []
            rng = np.random.default_rng((MEASURE_SEED, clean, number))
            while len(shown) < count:
                scene = sample_scene(rng, "held_out")
                if len(scene.concepts) == number:
                    shown.append(frozenset(scene.concepts))
                    pictures.append(render(scene) if clean else degrade(render(scene), rng))
            named = detector.names(np.stack(pictures))
            right = [a == b for a, b in zip(shown, named, strict=True)]
            scenes[f"{sort}, {('one', 'two')[number - 1]}"] = float(np.mean(right))
    junk = {}
    for number, (name, draw) in enumerate(JUNK.items()):
        rng = np.random.default_rng((MEASURE_SEED, 2, number))
        named = detector.names(np.stack([draw(rng) for _ in range(count)]))
        junk[name] = float(np.mean([not names for names in named]))
    return {"pictures_of_each_sort": count, "held_out_exact": scenes, "junk_named_none": junk}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=int, default=2000, help="pictures of each sort")
    parser.add_argument("--workdir", type=Path, default=Path("runs/detector"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if min(args.steps, args.batch, args.measure) < 1 or args.seed < 0 or not args.lr > 0:
        raise UserError("--steps, --batch, --measure and --lr must be above 0, --seed at least 0")
    return args


def main() -> None:
    """Trains from the last snapshot on, writes the weights, measures them."""
    args = parse_arguments()
    warmup = min(100, args.steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0, args.lr, warmup, args.steps, args.lr / 100)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2)
    )
    example = jnp.zeros((1, SIDE, SIDE, 3))
    variables = jax.jit(DetectorNet(training=True).init)(jax.random.key(args.seed), example)
    state, step = optimizer.init(variables["params"]), 0
    run = f"steps={args.steps} batch={args.batch} lr={args.lr} seed={args.seed} {concept_digest()}"
    snapshot = args.workdir / "snapshot.safetensors"
    if snapshot.is_file():
        step, (variables, state) = load_snapshot(snapshot, run, (variables, state))
        print(f"going on from step {step} of {snapshot}", flush=True)

    update = make_update(optimizer)
    began, first, shown, average = time.monotonic(), step, 0.0, None
    while step < args.steps:
        # The step runs while the next batch is drawn; its loss is read one step late.
        pictures, labels = training_batch(args.seed, step, args.batch)
        variables, state, loss = update(variables, state, pictures, labels)
        step += 1
        if step % 25 == 0:
            average = float(loss) if average is None else 0.8 * average + 0.2 * float(loss)
        if step % 500 == 0 or step == args.steps:
            save_snapshot(snapshot, step, run, (variables, state))
        if time.monotonic() - shown > 10 and average is not None:
            shown = time.monotonic()
            rate = (step - first) / (shown - began)
            print(
                f"step {step}/{args.steps}  loss {average:.4f}  {rate * args.batch:.0f} pictures/s"
                f"  {(args.steps - step) / rate:.0f} s left",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_params(fold_norms(variables), args.out)
    report = measure(Detector(load_params(args.out)), args.measure)
    report |= {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    size = args.out.stat().st_size / 2**20
    print(f"wrote {args.out} ({size:.2f} MiB) and {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
