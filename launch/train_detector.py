"""Trains the embedded world's detector on fresh renders and junk, and measures it.

    python launch/train_detector.py

takes about 8 minutes on one CPU core and writes safetydpo_jax/emoji/detector.safetensors and
detector.json (what was measured) beside it. Stopped in between, the same command goes on from the
last snapshot in --workdir. Picture i of the stream is a function of (seed, i).
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

from safetydpo_jax.emoji.concepts import CONCEPTS, INDEX
from safetydpo_jax.emoji.detector import (
    WEIGHTS,
    Detector,
    DetectorNet,
    concept_digest,
    load_params,
    save_params,
    to_pixels,
)
from safetydpo_jax.emoji.junk import JUNK, degrade
from safetydpo_jax.emoji.scenes import SIDE, pick, render, sample_scene
from safetydpo_jax.errors import UserError, run_main

JUNK_SHARE = 0.3
DEGRADED_SHARE = 0.6
MEASURE_SEED = 1_000_000  # of pictures that no training run sees


def training_picture(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One uint8 picture and its 0/1 label per concept, all 0 for junk."""
    rng = np.random.default_rng((seed, index))
    label = np.zeros(len(CONCEPTS), np.float32)
    if rng.random() < JUNK_SHARE:
        return pick(rng, list(JUNK.values()))(rng), label
    scene = sample_scene(rng)
    label[[INDEX[name] for name in scene.concepts]] = 1
    picture = render(scene)
    if rng.random() < DEGRADED_SHARE:
        picture = degrade(picture, rng)
    return picture, label


def training_batch(seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures and labels of a step."""
    pairs = [training_picture(seed, step * size + i) for i in range(size)]
    pictures, labels = zip(*pairs, strict=True)
    return np.stack(pictures), np.stack(labels)


def make_update(optimizer: optax.GradientTransformation):
    """The jitted step: (params, opt_state, pictures, labels) -> (params, opt_state, loss)."""

    def loss_of(params: Any, pictures: jax.Array, labels: jax.Array) -> jax.Array:
        logits = DetectorNet().apply({"params": params}, to_pixels(pictures))
        present = optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1)
        # Which concept, if any: the softmax tells concepts apart long before the sigmoids do.
        which = -(labels * jax.nn.log_softmax(logits)).sum(-1)
        return (present + which).mean()

    def update(params: Any, state: Any, pictures: jax.Array, labels: jax.Array):
        loss, gradient = jax.value_and_grad(loss_of)(params, pictures, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(update, donate_argnums=(0, 1))


def save_snapshot(path: Path, step: int, run: str, tree: Any) -> None:
    """Writes the leaves of (params, optimiser state) and the step, all or nothing."""
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
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=96)
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
    args = parse_arguments()
    warmup = min(100, args.steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0, args.lr, warmup, args.steps, args.lr / 100)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2)
    )
    example = jnp.zeros((1, SIDE, SIDE, 3))
    params = DetectorNet().init(jax.random.key(args.seed), example)["params"]
    state, step = optimizer.init(params), 0
    run = f"steps={args.steps} batch={args.batch} lr={args.lr} seed={args.seed} {concept_digest()}"
    snapshot = args.workdir / "snapshot.safetensors"
    if snapshot.is_file():
        step, (params, state) = load_snapshot(snapshot, run, (params, state))
        print(f"going on from step {step} of {snapshot}", flush=True)

    update = make_update(optimizer)
    began, first, shown, average = time.monotonic(), step, 0.0, None
    while step < args.steps:
        # The step runs while the next batch is drawn; its loss is read one step late.
        pictures, labels = training_batch(args.seed, step, args.batch)
        params, state, loss = update(params, state, pictures, labels)
        step += 1
        if step % 25 == 0:
            average = float(loss) if average is None else 0.8 * average + 0.2 * float(loss)
        if step % 250 == 0 or step == args.steps:
            save_snapshot(snapshot, step, run, (params, state))
        if time.monotonic() - shown > 10 and average is not None:
            shown = time.monotonic()
            rate = (step - first) / (shown - began)
            print(
                f"step {step}/{args.steps}  loss {average:.4f}  {rate * args.batch:.0f} pictures/s"
                f"  {(args.steps - step) / rate:.0f} s left",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_params(params, args.out)
    report = measure(Detector(load_params(args.out)), args.measure)
    report |= {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    size = args.out.stat().st_size / 2**20
    print(f"wrote {args.out} ({size:.2f} MiB) and {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    run_main(main)
