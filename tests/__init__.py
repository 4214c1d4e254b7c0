"""Tests; `check` is the type checker that conftest.py puts on every function of the package."""

from beartype import BeartypeConf, beartype

# As in PEP 484 and pyright: an int will do where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
