"""Reading a diffusers or transformers config.json without guessing.

A key that changes the network and that we do not implement must stop the load: a silently ignored
key gives pictures that are almost right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from safetydpo_jax.errors import UserError


def check_config(
    config: Mapping[str, Any],
    where: str,
    *,
    class_name: str,
    required: Sequence[str],
    only: Mapping[str, tuple[Any, ...]],
    absent: Sequence[str] = (),
) -> Mapping[str, Any]:
    """Returns `config` if it describes a network that is implemented here.

    Args:
      config: the parsed JSON.
      where: its place, for messages.
      class_name: the expected "_class_name".
      required: keys that must be there.
      only: key -> the values that are implemented (a missing key or null means the default).
      absent: keys that must be missing, null or false.

    Raises:
      UserError: naming the key, its value and the place.
    """
    found = config.get("_class_name", class_name)
    if found != class_name:
        raise UserError(f"{where}: this is a {found}, but a {class_name} is needed here")
    for key in required:
        if config.get(key) is None:
            raise UserError(f"{where}: the key '{key}' is missing; is this a complete config.json?")
    for key, values in only.items():
        value = config.get(key)
        if value is not None and value not in values:
            expected = " or ".join(repr(v) for v in values)
            raise UserError(f"{where}: '{key}' is {value!r}; supported: {expected}")
    for key in absent:
        if config.get(key):
            raise UserError(f"{where}: '{key}' = {config[key]!r} is not supported")
    return config


def one_number(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    """A whole number that some configs give as a list, for each block or side the same.

    Raises:
      UserError: they are not the same, or no whole numbers.
    """
    value = default if config.get(key) is None else config[key]
    first, *others = (set(value) or {None}) if isinstance(value, list | tuple) else {value}
    if others or not isinstance(first, int):
        raise UserError(f"{where}: '{key}' is {value!r}; one whole number is supported")
    return first


def per_block(
    value: Any, count: int, key: str, where: str, names: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Expands a scalar to one entry a block, checks a list's length, maps names to values."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(values) != count:
        raise UserError(f"{where}: '{key}' has {len(values)} entries for {count} blocks")
    if names is None:
        return values
    for name in values:
        if name not in names:
            raise UserError(f"{where}: '{key}' has {name!r}; supported: {', '.join(names)}")
    return tuple(names[name] for name in values)


def check_divisible(sizes: Sequence[int], parts: Sequence[int], key: str, where: str) -> None:
    """Raises UserError, naming `key`, unless each size splits into as many equal parts."""
    for size, count in zip(sizes, parts, strict=True):
        if count < 1 or size % count:
            raise UserError(f"{where}: '{key}': {size} channels do not split into {count} parts")
