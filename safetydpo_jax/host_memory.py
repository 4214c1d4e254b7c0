"""The host's memory, on Linux: asked for in large pages, and given back when it is not in use."""

import ctypes
import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_M_ARENA_MAX = -8  # of glibc's malloc.h
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts the running script anew with large pages, where the system leaves that to programs.

    On CPUs that makes a training step about a quarter faster: it fills hundreds of megabytes of
    fresh memory, and its first touch of every small page is a trap into the kernel. glibc asks for
    large pages only if told so before the process starts, hence the new start, under the same
    process id. Set GLIBC_TUNABLES to glibc.malloc.hugetlb=0 to do without. Call it before anything
    else is done.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not _MODE.is_file() or "[madvise]" not in _MODE.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def share_one_arena() -> None:
    """Has all threads that start from now on allocate from the main thread's memory.

    In arenas of their own, what a compilation frees stays: 0.4 GB of Stable Diffusion's step. It
    makes a training step some 5 % slower, so it is for runs that spare memory (config.remat).
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option:
            set_option(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Returns to the system what the process has freed and glibc still holds.

    Compiling a step of Stable Diffusion leaves behind more than a gigabyte of that.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)
