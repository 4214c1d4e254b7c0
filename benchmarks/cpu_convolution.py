"""XLA's 3x3 convolution against ours, on this CPU, for Stable Diffusion 1.5 and the embedded model.

    python benchmarks/cpu_convolution.py

Ours are Winograd's (`models.winograd`), with bfloat16 operands, too, and one matrix product
(`models.columns`). All are timed side by side in one process, forward and with respect to the
input, which is what training adapters needs; the rate is that of the convolution's own FLOPs, which
Winograd's has 2.25 times fewer of. Shapes are those of Stable Diffusion's UNet at 256 and 512
pixels, of its autoencoder and of the embedded model's training step; the `pay` of each module says
which get which form. Writes benchmarks/results/cpu_convolution.json.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

import jax
import jax.numpy as jnp

from benchmarks.machine import machine
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.models import columns, winograd
from safetydpo_jax.models.layers import convolution
from safetydpo_jax.storage import write_file

RESULT = Path(__file__).with_name("results") / "cpu_convolution.json"
# rows, side, channels in and out
SHAPES = [
    (2, 4, 1280, 1280),
    (2, 8, 1280, 1280),
    (4, 8, 1280, 1280),
    (2, 8, 2560, 1280),
    (2, 16, 640, 640),
    (2, 16, 1280, 1280),
    (8, 16, 1280, 1280),
    (2, 32, 320, 320),
    (2, 32, 640, 640),
    (2, 64, 320, 320),
    (1, 256, 256, 256),
    (1, 512, 128, 128),
    (40, 16, 64, 64),
    (40, 16, 192, 64),
    (40, 8, 192, 192),
    (40, 8, 384, 192),
]
FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "xla": lambda x, kernel: convolution(x, kernel, 1, ((1, 1), (1, 1))),
    "columns": columns.conv3x3,
    "winograd": winograd.conv3x3,
    "winograd_bfloat16": functools.partial(winograd.conv3x3, half=True),
}


def seconds(fn: Callable[..., jax.Array], *args: jax.Array) -> tuple[float, jax.Array]:
    """The least of ten calls, and the result."""
    fn, times = jax.jit(fn), []
    result = jax.block_until_ready(fn(*args))
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - started)
    return min(times), result


def main() -> None:
    """Times all shapes, prints them and writes the result."""
    rows = []
    for b, side, c, features in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (b, side, side, c))
        kernel = jax.random.normal(keys[1], (3, 3, c, features))
        dy = jax.random.normal(keys[2], (b, side, side, features))
        gflop = 2 * b * side**2 * 9 * c * features / 1e9
        gets = "winograd" if winograd.pay(x.shape, features) else "xla"
        if gets == "xla" and columns.pay(x.shape, features):
            gets = "columns"
        row = {"shape": [b, side, side, c, features], "gets": gets}
        wanted = None
        for name, conv in FORMS.items():
            if name == "columns" and 36 * x.size > columns.MOST_BYTES:
                continue

            def to_input(x: jax.Array, dy: jax.Array, kernel: jax.Array, conv=conv) -> jax.Array:
                return jax.vjp(lambda x: conv(x, kernel), x)[1](dy)[0]

            forward, y = seconds(conv, x, kernel)
            gradient, _ = seconds(to_input, x, dy, kernel)
            wanted = y if wanted is None else wanted
            error = float(jnp.abs(y - wanted).max() / jnp.abs(wanted).max())
            row[name] = {
                "forward_gflops": round(gflop / forward),
                "gradient_gflops": round(gflop / gradient),
                "difference": float(f"{error:.1g}"),
            }
        rows.append(row)
        print(row, flush=True)
    result = {"machine": machine(), "jax": jax.__version__, "rows": rows}
    write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {RESULT}")


if __name__ == "__main__":
    use_huge_pages()
    main()
