"""The platform that programs are traced for, where layers differ by it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target = contextvars.ContextVar("target", default="")


def target() -> str:
    """Such as "cpu", "gpu" or "tpu": JAX's own, or that of `compiling_for`."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it, `target` is a platform that need not be at hand."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
