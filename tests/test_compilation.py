"""Compiled programs, and their tracing."""

import gc

import pytest

from safetydpo_jax.compilation import tracing


def test_what_was_there_is_set_aside_while_a_program_is_traced():
    with tracing():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_also_by_one_that_cannot_be_traced():
    with pytest.raises(ZeroDivisionError), tracing():
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0
