"""A script starts anew once, with its arguments, its standard input and its process id."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from safetydpo_jax import huge_pages
huge_pages._MODE = Path(sys.argv[1])
print(os.getpid(), flush=True)
huge_pages.use_huge_pages()
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
