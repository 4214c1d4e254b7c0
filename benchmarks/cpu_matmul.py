"""Float32 against bfloat16 products on this CPU, for the shapes of the embedded UNet.

    python benchmarks/cpu_matmul.py

Both forms are timed side by side in one process; CPU seconds are counted, not wall time, since the
machine may be shared, and with large memory pages, as launch scripts run: without them the figures
change by half from run to run. Writes benchmarks/results/cpu_matmul.json.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from benchmarks.machine import machine
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.models import mixed

RESULT = Path(__file__).with_name("results") / "cpu_matmul.json"


def cpu_seconds(fn, *args) -> float:
    """The least CPU time of 25 calls: with fewer the result changed from run to run."""
    fn = jax.jit(fn)
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(25):
        start = time.process_time()
        jax.block_until_ready(fn(*args))
        times.append(time.process_time() - start)
    return min(times)


def with_gradients(fn):
    """fn and both its gradients, one after the other as in training: of half the sum of squares."""

    def run(x, w):
        y, vjp = jax.vjp(fn, x, w)
        return y, vjp(y)

    return run


def main() -> None:
    """Times products and writes the result file."""
    key = jax.random.key(0)
    x, w = jax.random.normal(key, (4096, 160)), jax.random.normal(key, (160, 1280))
    cases = {"linear 4096 x 160 x 1280": (jnp.matmul, mixed.matmul, x, w)}
    rows = []
    for name, (plain, fast, left, right) in cases.items():
        flops = jax.jit(plain).lower(left, right).compile().cost_analysis()["flops"]
        for what, passes in (("forward", 1), ("forward + backward", 3)):
            forms = (plain, fast) if passes == 1 else map(with_gradients, (plain, fast))
            seconds = [cpu_seconds(form, left, right) for form in forms]
            rates = [passes * flops / s / 1e9 for s in seconds]
            rows.append(
                {
                    "case": name,
                    "pass": what,
                    "float32_gflops_per_cpu_second": round(rates[0], 1),
                    "bfloat16_gflops_per_cpu_second": round(rates[1], 1),
                    "speedup": round(rates[1] / rates[0], 2),
                }
            )
            print(f"{name}, {what}: {rates[0]:.0f} -> {rates[1]:.0f} GFLOP per CPU second")
    RESULT.parent.mkdir(exist_ok=True)
    content = {"machine": machine(), "jax": jax.__version__, "rows": rows}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {RESULT}")


if __name__ == "__main__":
    use_huge_pages()
    main()
