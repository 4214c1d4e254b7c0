"""What a figure was measured on: the kinds of processor differ by a factor of four."""

import os
import platform
import re
from pathlib import Path

import jax

_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # the widest first


def machine() -> str:
    """The processor, its vector and matrix units and its cores, as in "AMD EPYC, avx2, 2 cores"."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""

    def of(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
        return found[1] if found else ""

    flags = of("flags").split()
    units = ", ".join(unit for unit in _UNITS if unit in flags)
    name = of("model name") or platform.machine()
    # An accelerator says more than the processor beside it.
    device = "" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return ", ".join(filter(None, (device, name, units, f"{os.cpu_count()} cores")))
