"""What a figure was measured on: the kinds of processor differ by a factor of four."""

import os
import platform
import re
from pathlib import Path

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
    return ", ".join(filter(None, (name, units, f"{os.cpu_count()} cores")))
