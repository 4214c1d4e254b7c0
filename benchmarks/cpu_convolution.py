"""XLA's 3x3 convolution against ours as one matrix product, on this CPU, for Stable Diffusion 1.5.

    python benchmarks/cpu_convolution.py

Both are timed side by side in one process, in float32, forward and with respect to the input, which
is what training adapters needs; the rate is that of the convolution's own FLOPs. Shapes are those
of the UNet's levels at 256 and 512 pixels; `models.columns.pay` says which get the second form.
Writes benchmarks/results/cpu_convolution.json.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

import jax

from benchmarks.cpu_matmul import convolution
from benchmarks.machine import machine
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.models import columns
from safetydpo_jax.storage import write_file

RESULT = Path(__file__).with_name("results") / "cpu_convolution.json"
# rows, side, channels in and out
SHAPES = [
    (2, 4, 1280, 1280),
    (2, 8, 1280, 1280),
    (2, 8, 2560, 1280),
    (2, 16, 640, 640),
    (2, 16, 1280, 1280),
    (8, 16, 1280, 1280),
    (2, 32, 320, 320),
    (2, 32, 640, 640),
    (2, 64, 320, 320),
]


def seconds(fn: Callable[..., jax.Array], *args: jax.Array) -> float:
    """The least of ten calls."""
    fn, times = jax.jit(fn), []
    jax.block_until_ready(fn(*args))
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Times all shapes, prints them and writes the result."""
    rows = []
    for b, side, c, features in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (b, side, side, c))
        kernel = jax.random.normal(keys[1], (3, 3, c, features))
        dy = jax.random.normal(keys[2], (b, side, side, features))
        gflop = 2 * b * side**2 * 9 * c * features / 1e9
        row = {"shape": [b, side, side, c, features], "columns": columns.pay(x, kernel)}
        for name, conv in (("xla", convolution), ("one_product", columns.conv3x3)):

            def to_input(x: jax.Array, dy: jax.Array, kernel: jax.Array, conv=conv) -> jax.Array:
                return jax.vjp(lambda x: conv(x, kernel), x)[1](dy)[0]

            row[f"{name}_gflops"] = {
                "forward": round(gflop / seconds(conv, x, kernel)),
                "gradient": round(gflop / seconds(to_input, x, dy, kernel)),
            }
        rows.append(row)
        print(row, flush=True)
    result = {"machine": machine(), "jax": jax.__version__, "rows": rows}
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {RESULT}")


if __name__ == "__main__":
    use_huge_pages()
    main()
