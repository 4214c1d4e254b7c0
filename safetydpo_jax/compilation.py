"""Compiled programs, kept on disk: the second start of a run need not compile again."""

import contextlib
import gc
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from safetydpo_jax.remote import cache_home

MOST_BYTES = 4 * 2**30  # the ones used longest ago go
WRITING_SECONDS = 60  # after which a program's file is not being written any more


def keep_compiled(shared: str | Path = "") -> None:
    """Has JAX keep what it compiles from now on, and take up what it has kept.

    In this user's cache, as much as `MOST_BYTES`. JAX_COMPILATION_CACHE_DIR says another folder,
    JAX_ENABLE_COMPILATION_CACHE=0 does without.

    Args:
      shared: of a job of several processes, a folder or an address that all of them see, for all it
        compiles. Of a job the first process alone keeps programs. Were they where the others do not
        find them, these would compile at every start; and on GPUs they would wait, for a day, for
        the first to time its share of the kernels that one may choose from.
    """
    config: Any = jax.config  # its settings are attributes made at run time
    if not config.jax_compilation_cache_dir:
        folder, most = (shared, -1) if shared else (cache_home() / "compiled", MOST_BYTES)
        # What is compiled for one kind of processor may not run on another.
        kind = f"/{_processor()}" if jax.default_backend() == "cpu" else ""
        folder = f"{folder}{kind}"
        jax.config.update("jax_compilation_cache_dir", folder)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            # A limit is kept by a lock, for which there is none in a bucket.
            jax.config.update("jax_compilation_cache_max_size", most)
        if not shared and config.jax_compilation_cache_max_size != -1:
            _remove_halves(Path(folder))
    if shared or "://" in config.jax_compilation_cache_dir:
        # XLA's own caches beside it, on GPUs, know of no buckets, and where they are is a part of
        # a program's key, which would differ where hosts have a folder under other names.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Within it Python's garbage collector leaves alone what has been there before.

    Tracing makes so many objects that it runs again and again; to look through all that is loaded
    each time took a third of the time. Not to be nested: the end is one for all.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _remove_halves(folder: Path) -> None:
    """Removes what a kill left half written, of programs kept up to a limit.

    JAX writes the time of a program's last use after it. Where that is missing, the program cannot
    be read or is not to be trusted, and looking for what to remove fails: nothing would be kept
    any more.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        # Another process did the same, or it may be read and not written: JAX warns of that.
        with contextlib.suppress(OSError):
            if not used.exists() and time.time() - program.stat().st_mtime > WRITING_SECONDS:
                program.unlink()


def _processor() -> str:
    """Eight hex digits for this host's kind of processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    telling = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # x86, then ARM
    lines = {line for line in text.splitlines() if line.startswith(telling)}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8]
