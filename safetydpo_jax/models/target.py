"""The platform that programs are traced for, where layers differ by it."""

import contextlib

import jax

# One of JAX's own contexts, so that its caches tell programs for different platforms apart.
_target = jax.make_user_context("")


def target() -> str:
    """Such as "cpu", "gpu" or "tpu": JAX's own, or that of `compiling_for`, even "any"."""
    return _target.value or jax.default_backend()


def compiling_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """Within it, `target` is a platform that need not be at hand.

    A jitted function that was traced outside is traced again within, and the other way round: the
    platform is a part of the keys of JAX's caches. What keeps its answer by other means does not
    know of it: a caller may not take out a jaxpr, or a traced or lowered program, that it made
    under another platform, nor call `target` under `functools.cache`. The context is of the thread
    that enters it.
    """
    return _target(platform)
