"""Compiled programs, kept on disk: the second start of a run need not compile again."""

import contextlib
import gc
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from safetydpo_jax.remote import cache_home

MOST_BYTES = 4 * 2**30  # the ones used longest ago go


def keep_compiled() -> None:
    """Has JAX keep what it compiles from now on, and take up what it has kept.

    In this user's cache, a folder for each kind of processor, as programs compiled for one may not
    run on another. JAX_COMPILATION_CACHE_DIR says another folder, JAX_ENABLE_COMPILATION_CACHE=0
    does without.
    """
    config: Any = jax.config  # its settings are attributes made at run time
    if config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_home() / "compiled" / _processor()))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


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


def _processor() -> str:
    """Eight hex digits for this host's kind of processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    telling = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # x86, then ARM
    lines = {line for line in text.splitlines() if line.startswith(telling)}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8]
