"""What chips send each other, read of the text of a compiled program.

Of an array that n chips gather, scatter or reduce, each sends a share that does not depend on how
the links lie, if none sends more than it must (as round a ring): `share`.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"([a-z]\d*[a-z]*\d*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
# Groups of chips, in the three forms that libtpu writes: a list, an array of numbers in order (of
# which T swaps axes), and the axes of a mesh, which may have an array of its own.
_PAIRS = re.compile(r"source_target_pairs=\{\{([\d,]+)\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_NAMED = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")  # an axis, or of it one factor
_ARANGE = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")


class Group(NamedTuple):
    """A kind of collective, among groups of a size.

    Attributes:
      kind: one of `KINDS`.
      chips: that take part in one, those of one group.
      over_data: whether a group has chips of every shard of the mesh's "data" axis, which is longer
        on a larger slice.
    """

    kind: str
    chips: int
    over_data: bool


def share(kind: str, chips: int) -> float:
    """How much of the whole array each of so many chips sends.

    The whole is an all-gather's result and a reduce-scatter's operand; of the others what one chip
    has, which a collective-permute sends once.
    """
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (chips - 1) / chips


def read(line: str, opcode: str, chips: int, data: int) -> tuple[Group, int]:
    """One collective.

    Args:
      line: the instruction.
      opcode: its own, one of `KINDS`, with "-start" if it is split in two.
      chips: that run the program.
      data: shards of the mesh's first axis, "data", over which they are spread in order.

    Returns:
      Its group, and the bytes of the whole array as `share` has it.
    """
    kind = opcode.removesuffix("-start")
    text = line.split(" = ", 1)[1]
    found = list(arrays(text[: text.index(f" {opcode}(")]))
    group = _first_group(line, chips)
    times = len(group) if kind == "reduce-scatter" else 1
    if kind != opcode and kind != "all-reduce":
        # What starts one names what is given, what will come, and then counters of its own.
        found = [array for array in found if array[1]]
        found = found[: len(found) // 2]
        times = len(group) if kind == "all-gather" else 1
    size = sum(_BYTES.get(name, 4) * math.prod(shape) for name, shape in found)
    shards = {chip // (chips // data) for chip in group}
    return Group(kind, len(group), data > 1 and len(shards) == data), times * size


def arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The types and shapes that a text names."""
    for name, sides in _ARRAY.findall(text):
        yield name, _numbers(sides)


def _first_group(line: str, chips: int) -> tuple[int, ...]:
    """Which chips take part in the first of the groups, all of which are as large; else all."""
    if listed := _LISTED.search(line) or _PAIRS.search(line):
        return _numbers(listed[1])
    if iota := _IOTA.search(line):
        return _rows(_arange(iota[2]).reshape(_numbers(iota[1][1:-1])))
    if mesh := _MESH.search(line):
        sizes = {name: int(size) for name, size in _AXIS.findall(mesh[1])}
        ids = _arange(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        named = {
            name: (int(before or 1), int(part or sizes[name]))
            for name, before, part in _NAMED.findall(mesh[3])
        }
        parts = [named.get(name, (1, 1)) for name in sizes]  # one chip of an axis without a name
        shape = [
            (before, part, size // (before * part))
            for (before, part), size in zip(parts, sizes.values(), strict=True)
        ]
        ids = ids.reshape(sum(shape, ()))
        ids = np.moveaxis(ids, range(1, ids.ndim, 3), range(-len(parts), 0))
        return _rows(ids.reshape(-1, math.prod(part for _, part in parts)))
    return tuple(range(chips))


def _arange(text: str) -> np.ndarray:
    """Of "[2,2]T(1,0)" the numbers from 0, axes swapped; of a list the numbers as they are."""
    if not (found := _ARANGE.match(text)):
        return np.array(_numbers(text))
    shape = _numbers(found[1])
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(found[2])) if found[2] else ids


def _rows(groups: np.ndarray) -> tuple[int, ...]:
    return tuple(int(chip) for chip in groups[0])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
