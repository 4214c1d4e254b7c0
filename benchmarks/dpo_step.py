"""Seconds of a DPO step against its floor: the products it needs, at this machine's rate.

    python benchmarks/dpo_step.py
    python benchmarks/dpo_step.py --model runs/true_size/sd15 --pixels 512 --remat   # one pair

The floor is the FLOPs that the step needs (see `step_flops`) over the rate of one large matrix
product, measured in the same process just before.

The memory that a step cannot do without is the base's weights, the adapters with their optimiser,
and the activations that the gradient keeps; the peak is of the whole process, Python included.
Writes benchmarks/results/dpo_step.json, or dpo_step_MODEL_PIXELS.json.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for configs

from benchmarks.machine import machine
from benchmarks.memory import Memory
from configs import common
from safetydpo_jax import host_memory, lora, sharding
from safetydpo_jax.errors import run_main
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.models.pipeline import Pipeline
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.storage import write_file
from safetydpo_jax.train.flops import step_flops
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import TrainState, make_optimizer
from safetydpo_jax.train.step import Numbers, make_loss, make_train_step, numbers_of

ROOT = Path(__file__).resolve().parents[1]
CASES = [("paper", "float32"), ("anchored", "float32"), ("anchored", "bfloat16")]
LARGE = [("paper", "float32")]  # with --pixels
SIDE = 2048  # of the square matrices whose product sets the rate


def main() -> None:
    """Times the cases, prints them and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a case (5)")
    parser.add_argument("--pixels", type=int, help="side of the pictures; one pair a step")
    parser.add_argument("--remat", action="store_true", help="config.remat")
    args = parser.parse_args()
    if args.remat:
        host_memory.share_one_arena()  # as training does
    pipeline = load_pipeline(args.model)
    if args.remat:
        pipeline.networks["unet"] = pipeline.unet.clone(remat=True)
    null = jax.tree.map(lambda x: x[0], pipeline.encode_negative([""]))
    for name in set(pipeline.params) - {"unet"}:  # their work is done before training
        del pipeline.params[name]
    gc.collect()
    rows = []
    for recipe, precision in LARGE if args.pixels else CASES:
        row = measure(pipeline, null, recipe, precision, args.steps, args.pixels)
        rows.append(row)
        print(
            "{recipe}, {matmul_precision}: {step_seconds} s a step, floor {floor_seconds} s, "
            "{step_over_floor} x; compiled in {compile_seconds} s; {peak_mb} MB, "
            "{peak_over_needed} x what it needs".format(**row),
            flush=True,
        )
    result = {
        "device": f"{jax.devices()[0].device_kind}: {machine()}",
        "jax": jax.__version__,
        "remat": args.remat,
        "cases": rows,
    }
    name = f"dpo_step_{Path(args.model).name}_{args.pixels}" if args.pixels else "dpo_step"
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {path}")


@dataclasses.dataclass
class Case:
    """A step with all that it takes, of random numbers; `state` is given up to the step."""

    config: Any
    step: Any
    state: TrainState
    batch: dict[str, Any]
    numbers: Numbers
    mesh: jax.sharding.Mesh


def make_case(
    pipeline: Pipeline,
    null: Conditioning,
    recipe: str,
    pixels: int | None,
    rank: int = 4,
    experts: int | None = None,
    pairs: int = 1,
) -> Case:
    """The recipe's own batch and rank; or, with `pixels`, `pairs` of so large pictures, `rank`.

    Of `experts`, the same for each.
    """
    config = common.get_config("hate")
    config.recipe = recipe
    shape = pipeline.latent_shape
    if pixels:
        config.batch_size, config.lora.rank = pairs, rank
        shape = (*(n * pixels // pipeline.resolution for n in shape[:2]), shape[2])
    config.remat = pipeline.unet.remat
    config, mesh = resolve(config), sharding.make_mesh()
    adapters = lora.init_adapters(
        jax.random.key(0), pipeline.unet_params, rank=config.lora.rank, targets=config.lora.targets
    )
    batch = random_batch(config, shape, null)
    if experts:
        adapters = jax.tree.map(lambda x: jnp.stack([x] * experts), adapters)
        batch = jax.tree.map(lambda x: np.stack([x] * experts, 1), batch)
    state = TrainState.create(adapters, make_optimizer(config), several=experts is not None)
    return Case(
        config,
        make_train_step(pipeline.unet, pipeline.schedule, config, mesh, experts),
        jax.device_put(state, sharding.replicated(mesh)),
        batch,
        numbers_of(config)(0),
        mesh,
    )


def measure(
    pipeline: Pipeline,
    null: Conditioning,
    recipe: str,
    precision: str,
    steps: int,
    pixels: int | None,
) -> dict[str, Any]:
    """One case: the median step of `steps`, the floor at the products' rate, and the memory."""
    case = make_case(pipeline, null, recipe, pixels)
    config, state, batch, numbers = case.config, case.state, case.batch, case.numbers
    count = 2 * config.batch_size + config.preserve_batch_size
    with jax.default_matmul_precision(precision):
        rate = product_rate(precision)
        started = time.perf_counter()
        compiled = case.step.lower(state, pipeline.unet_params, batch, null, numbers).compile()
        compile_seconds = time.perf_counter() - started
        host_memory.give_back()  # as training does
        with Memory() as memory:
            state, metrics = compiled(state, pipeline.unet_params, batch, null, numbers)
            jax.block_until_ready(metrics)
            seconds = []
            for _ in range(steps):
                started = time.perf_counter()
                state, metrics = compiled(state, pipeline.unet_params, batch, null, numbers)
                jax.block_until_ready(metrics)
                seconds.append(time.perf_counter() - started)
    loss = make_loss(pipeline.unet, pipeline.schedule, config, case.mesh)
    weights, trained = (
        sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (pipeline.unet_params, state)
    )
    kept = kept_bytes(
        lambda x: loss(x, pipeline.unet_params, batch, null, numbers), state.adapters, count
    )
    needed = (weights + trained + kept) // 10**6
    shape = batch["winner"]["mean"].shape[1:]
    flops = step_flops(pipeline.unet, pipeline.unet_params, shape, null, config)
    step_seconds, floor = float(np.median(seconds)), flops / rate
    return {
        "recipe": recipe,
        "matmul_precision": precision,
        "unet_rows": count,
        "gflop": round(flops / 1e9, 1),
        "product_gflops_per_s": round(rate / 1e9),
        "floor_seconds": round(floor, 3),
        "step_seconds": round(step_seconds, 3),
        "step_over_floor": round(step_seconds / floor, 2),
        "compile_seconds": round(compile_seconds, 1),
        "weights_mb": weights // 10**6,
        "adapters_and_optimizer_mb": trained // 10**6,
        "kept_activations_mb": kept // 10**6,
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes // 10**6,
        "peak_mb": memory.anonymous,
        "peak_over_needed": round(memory.anonymous / needed, 2),
    }


def kept_bytes(loss: Any, adapters: Any, rows: int) -> int:
    """Bytes of what the gradient keeps a row of: the leaves of the backward pass's closure."""
    kept = jax.eval_shape(lambda x: jax.vjp(loss, x, has_aux=True)[1], adapters)
    arrays = [x for x in jax.tree.leaves(kept) if x.ndim > 2 and x.shape[0] == rows]
    return sum(x.size * x.dtype.itemsize for x in arrays)


def product_rate(precision: str) -> float:
    """FLOP/s of one large matrix product, the best of ten."""
    kind = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x = jax.random.normal(jax.random.key(0), (SIDE, SIDE)).astype(kind)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    best = np.inf
    for _ in range(10):
        started = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2.0 * SIDE**3 / best


def random_batch(config: Any, latent_shape: tuple[int, ...], null: Conditioning) -> dict[str, Any]:
    """A batch of the shapes that `data.batches` yields."""
    rng = np.random.default_rng(0)

    def moments(n: int) -> dict[str, np.ndarray]:
        mean = rng.normal(size=(n, *latent_shape)).astype(np.float32)
        return {"mean": mean, "logvar": np.full_like(mean, -4.0)}

    def rows(n: int, first: int) -> dict[str, np.ndarray]:
        return {
            "conditioning": texts(n),
            "row_id": np.arange(first, first + n, dtype=np.uint32),
            "draw": np.zeros(n, np.uint32),
        }

    def texts(n: int) -> Conditioning:
        return jax.tree.map(lambda x: rng.normal(size=(n, *x.shape)).astype(np.float32), null)

    n, m = config.batch_size, config.preserve_batch_size
    pairs = {"winner": moments(n), "loser": moments(n), "winner_conditioning": texts(n)}
    batch: dict[str, Any] = pairs | rows(n, 0)
    if m:
        batch["preserve"] = moments(m) | {"harm": texts(m)} | rows(m, n)
    return batch


if __name__ == "__main__":
    host_memory.use_huge_pages()
    run_main(main)
