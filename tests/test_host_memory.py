"""Large pages come with one new start of the script, and freed memory goes back to the system."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safetydpo_jax import host_memory

SCRIPT = """
import os, sys
from pathlib import Path
from safetydpo_jax import host_memory
host_memory._MODE = Path(sys.argv[1])
print(os.getpid(), flush=True)
host_memory.use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES", ""), sys.argv[2:], sys.flags.utf8_mode, sys.stdin.read())
"""


@pytest.mark.parametrize(
    ("mode", "before", "starts", "after"),
    [
        ("always [madvise] never", "", 2, "glibc.malloc.hugetlb=1"),
        (
            "always [madvise] never",
            "glibc.malloc.perturb=1",
            2,
            "glibc.malloc.perturb=1:glibc.malloc.hugetlb=1",
        ),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", "", 1, ""),
        (None, "", 1, ""),
    ],
)
def test_started_anew_where_it_helps(tmp_path, mode, before, starts, after):
    """With its arguments, its standard input and its process id."""
    script, file = tmp_path / "script.py", tmp_path / "enabled"
    script.write_text(SCRIPT)
    if mode is not None:
        file.write_text(mode)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if before:
        environment["GLIBC_TUNABLES"] = before
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(script), str(file), "--a", "b c"],
        env=environment,
        input="typed",
        capture_output=True,
        text=True,
        check=True,
    )
    *pids, last = done.stdout.splitlines()
    assert last == f"{after} ['--a', 'b c'] 1 typed"
    assert len(pids) == starts
    assert len(set(pids)) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_freed_memory_is_given_back():
    """What lies below a piece still in use stays with glibc until then."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pieces = [np.ones(2**12) for _ in range(4000)]  # 32 KiB each: from the heap
    kept = pieces.pop()
    del pieces
    before = resident()
    host_memory.give_back()
    assert before - resident() > 80e6
    assert kept.sum() == 2**12
