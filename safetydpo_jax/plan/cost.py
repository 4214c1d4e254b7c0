"""What the TPU compiler says of a program: cycles, and what chips send each other.

It writes an estimate beside every instruction that its cost model knows, in the text of the
optimised program. Kernels of Pallas have none: `flash` reckons them. Copies that run beside the
computation, between a chip's memories, have none either, and are taken to be hidden.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from safetydpo_jax.plan.chips import Chip

# Kinds of work, by the first expression that an instruction's name in the model has.
KINDS = (
    ("norm", re.compile(r"norm")),
    ("convolution", re.compile(r"conv\d?\b|conv_|samplers|resnets")),
    ("linear", re.compile(r"to_[qkv]|to_out|/ff|proj_in|proj_out|time_emb")),
    ("attention", re.compile(r"attn\d")),
)
_SENDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply=|branch_computations=\{|calls=)%?([\w.\-]+)")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_ARRAY = re.compile(r"([a-z]\d*[a-z]*\d*)\[([\d,]*)\]")
LANES = 128  # of a register
EXPONENTIALS = 1024  # in a cycle
_FLASH_PRODUCTS = {"flash_mha_bwd_dkv": 4, "flash_mha_bwd_dq": 3, "flash_attention": 2}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}


class Cost(NamedTuple):
    """Of one chip's share of a program.

    Attributes:
      cycles: by kind of work, as the compiler estimates them; Pallas's kernels by `flash`.
      sent: bytes by kind of collective, those that a chip gives to it.
      counts: how many collectives there are of each kind.
      unknown_loops: whose number of turns is not known, and that count as one turn.
    """

    cycles: dict[str, float]
    sent: dict[str, int]
    counts: dict[str, int]
    unknown_loops: int


def cost_of(text: str, chip: Chip) -> Cost:
    """Reads an optimised program's text; an instruction counts as often as its loops turn."""
    computations, entry = _computations(text)
    cycles: dict[str, float] = defaultdict(float)
    sent: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    unknown = 0

    def walk(name: str, times: int) -> None:
        nonlocal unknown
        for opcode, line in computations[name]:
            if opcode == "while":
                found = _LOOP.search(line)
                assert found, line
                turns = _turns(computations[found[1]])
                unknown += turns is None
                walk(found[2], times * (turns or 1))
                continue
            if opcode in ("call", "conditional"):
                for called in _CALLED.findall(line):
                    walk(called, times)
            operation = _OP_NAME.search(line)
            kind = _kind(operation[1] if operation else "")
            if known := _CYCLES.search(line):
                cycles[kind] += times * int(known[1])
            elif "tpu_custom_call" in line:
                cycles["attention kernels"] += times * flash(line, chip)
            collective = opcode.removesuffix("-start")
            if collective in _SENDS:
                counts[collective] += times
                sent[collective] += times * _given_bytes(line, opcode)

    walk(entry, 1)
    return Cost(dict(cycles), dict(sent), dict(counts), unknown)


def flash(line: str, chip: Chip) -> float:
    """Cycles of one call of JAX's Pallas flash attention for TPUs.

    Each of a head's t x s scores takes part in two products forward, in four of the kernel for the
    gradients of keys and values, and in three in that of queries', each as deep or as wide as a
    head filled up to the 128 lanes of a register: t s width / (units x side^2) cycles, or on a unit
    with more multipliers than lanes as many as if it had 128 a side that way. And one exponential:
    1024 a cycle. They are added, as if a chip did not do both at once.
    """
    operands = [shape for _, shape in _arrays(line.partition("operand_layout_constraints")[2])]
    (rows, heads, tokens, width), keys = operands[:2]
    products = next(n for name, n in _FLASH_PRODUCTS.items() if name in line)
    filled = -(-width // LANES) * LANES
    multipliers = chip.units * chip.side * min(chip.side, LANES)
    return rows * heads * tokens * keys[2] * (products * filled / multipliers + 1 / EXPONENTIALS)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Each computation's (opcode, line), by name, and the name of the one that is run."""
    found: dict[str, list[tuple[str, str]]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line[:1].strip():
            if head := _HEAD.match(line):
                lines = found.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif lines is not None and " = " in line:
            opcode = _OPCODE.search(line.split(" = ", 1)[1])
            lines.append((opcode[1] if opcode else "", line))
    return found, entry


def _turns(condition: list[tuple[str, str]]) -> int | None:
    """How often a loop turns that counts from 0 to the one constant of its condition."""
    constants = [found[1] for _, line in condition if (found := _CONSTANT.search(line))]
    return int(constants[0]) if len(constants) == 1 else None


def _kind(operation: str) -> str:
    return next((kind for kind, named in KINDS if named.search(operation)), "other")


def _arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The types and shapes that a text names."""
    for kind, sides in _ARRAY.findall(text):
        yield kind, tuple(int(side) for side in sides.split(",") if side)


def _given_bytes(line: str, opcode: str) -> int:
    """Bytes that a chip gives to a collective."""
    text = line.split(" = ", 1)[1]
    arrays = list(_arrays(text[: text.index(f" {opcode}(")]))
    # An all-reduce may be of many arrays; what starts another has what is given first.
    given = arrays if opcode.startswith("all-reduce") else arrays[:1]
    return sum(_BYTES.get(kind, 4) * math.prod(shape) for kind, shape in given)
