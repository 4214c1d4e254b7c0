"""What compiling SDXL's stacks of ten blocks takes, and what a scan over them could save.

    python benchmarks/sdxl_compilation.py       # needs `pip install libtpu`, no TPU

XLA's TPU compiler is given the gradient of a LoRA on SDXL, once with stacks of one block and once
of two where the published model has ten: from what a block more takes follows what all ten would.
With a scan they would take what one does, at best. Writes
benchmarks/results/sdxl_compilation.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

from benchmarks.machine import machine
from safetydpo_jax.errors import run_main
from safetydpo_jax.lora import init_adapters
from safetydpo_jax.models.checkpoint import param_shapes, read_json
from safetydpo_jax.models.unet import UNet2DConditionModel, UNetConfig
from safetydpo_jax.plan import slice_of, use_cpu
from safetydpo_jax.plan.programs import lowered
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "safetydpo_jax" / "models" / "published" / "sdxl"
RESULT = ROOT / "benchmarks" / "results" / "sdxl_compilation.json"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def main(argv: list[str] | None = None) -> None:
    """Compiles for each depth, then writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2", help="whose first chip it is for")
    parser.add_argument("--pixels", type=int, default=256, help="1024 takes hours on two cores")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2], help="of the stacks")
    args = parser.parse_args(argv)
    use_cpu()
    device = slice_of(args.topology)[1][0]
    found: dict[int, dict[str, float]] = {}
    for depth in args.depths:
        found[depth] = compile_step(depth, args.pixels, device)
        print(f"{depth} in a stack: {found[depth]}", flush=True)
    first, second = (sum(found[depth].values()) for depth in args.depths[:2])
    block = (second - first) / (args.depths[1] - args.depths[0])
    result = {
        "machine": machine(),
        "chip": device.device_kind,
        "pixels": args.pixels,
        "seconds": found,
        "seconds_of_ten": round(first + (10 - args.depths[0]) * block, 1),
        "seconds_of_a_scan": round(first, 1),
    }
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1), f"written: {RESULT}", sep="\n")


def compile_step(depth: int, pixels: int, device: Any) -> dict[str, float]:
    """Seconds of tracing and of compiling the gradient of one row, as a step has it with remat."""
    config = read_json(PUBLISHED / "unet" / "config.json")
    layers = [min(x, depth) if x > 2 else x for x in config["transformer_layers_per_block"]]
    config |= {"transformer_layers_per_block": layers}
    unet = UNet2DConditionModel(
        UNetConfig.from_dict(config, "sdxl"), dtype=jnp.bfloat16, remat=True
    )
    params = param_shapes({"unet": unet})["unet"]
    lora = jax.eval_shape(lambda: init_adapters(jax.random.key(0), params, rank=4, targets=TARGETS))
    side = pixels // 8
    inputs = (
        jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 77, 2048), jnp.float32),
        jax.ShapeDtypeStruct((1, 1280), jnp.float32),
        jax.ShapeDtypeStruct((1, 6), jnp.float32),
    )
    whole = NamedSharding(Mesh([device], ("data",)), PartitionSpec())

    def loss(lora: Any, params: Any, *inputs: Any) -> Any:
        return jnp.sum(jnp.square(unet.apply({"params": params, "lora": lora}, *inputs)))

    began = time.monotonic()
    program = lowered(jax.jit(jax.grad(loss), in_shardings=whole), lora, params, *inputs)
    traced = time.monotonic()
    program.compile()
    return {
        "trace": round(traced - began, 1),
        "compile": round(time.monotonic() - traced, 1),
    }


if __name__ == "__main__":
    run_main(main)
