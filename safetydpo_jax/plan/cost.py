"""What the TPU compiler says of a program: cycles, and what chips send each other.

It writes an estimate beside every instruction that its cost model knows, in the text of the
optimised program. Kernels of Pallas have none: `splash` reckons those that are ours, and others are
named. Copies that run beside the computation, between a chip's memories, have none either, and are
taken to be hidden.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator

from safetydpo_jax.plan import collectives
from safetydpo_jax.plan.chips import Chip
from safetydpo_jax.plan.collectives import Group

# Kinds of work, by the first expression that an instruction's name in the model has.
KINDS = (
    ("norm", re.compile(r"norm")),
    ("convolution", re.compile(r"conv\d?\b|conv_|samplers|resnets")),
    ("linear", re.compile(r"to_[qkv]|to_out|/ff|proj_in|proj_out|time_emb")),
    ("attention", re.compile(r"attn\d|_plain_attention")),
)
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w\-]+?)[.\d]* = ")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_CHIPS = re.compile(r"^HloModule .*num_partitions=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_CONSTANT = re.compile(r"constant\((\d+)\)")
FILLED = 128  # what a head is filled up to
EXPONENTIALS = 1024  # in a core's cycle
_SPLASH = re.compile(r"\s*%splash_mha_(fwd|dkv)")  # forward, and all gradients
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 5}


@dataclasses.dataclass
class Cost:
    """Of one chip's share of a program.

    Attributes:
      cycles: by kind of work, as the compiler estimates them; Pallas's kernels by `splash`.
      counts: how many collectives there are, by kind and size of group.
      sizes: bytes of their whole arrays, of which each chip sends `collectives.share`.
      unknown_kernels: how often each of Pallas's runs that is not ours; their cycles are missing.
      unknown_loops: whose number of turns is not known, and that count as one turn.
      branches: choices made as the program runs, of which the one with most cycles counts.
    """

    cycles: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[Group] = dataclasses.field(default_factory=Counter)
    sizes: Counter[Group] = dataclasses.field(default_factory=Counter)
    unknown_kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0
    branches: int = 0

    def add(self, other: "Cost", times: int = 1) -> None:
        """Counts a part of the program, so many times."""
        for name in ("cycles", "counts", "sizes", "unknown_kernels"):
            for key, n in getattr(other, name).items():
                getattr(self, name)[key] += times * n
        self.unknown_loops += other.unknown_loops
        self.branches += other.branches


def cost_of(text: str, chip: Chip, data: int = 1) -> Cost:
    """Reads an optimised program's text; an instruction counts as often as its loops turn.

    Args:
      text: as the compiler writes it.
      chip: that it is for.
      data: shards of the mesh's "data" axis.
    """
    computations, entry = _computations(text)
    found = _CHIPS.search(text)
    chips = int(found[1]) if found else 1

    def of(name: str) -> Cost:
        total = Cost()
        for opcode, line in computations[name]:
            if opcode == "while":
                found = _LOOP.search(line)
                assert found, line
                turns = _turns(computations[found[1]])
                total.unknown_loops += turns is None
                total.add(of(found[2]), turns or 1)
                continue
            if opcode == "conditional":
                total.branches += 1
                total.add(max(map(of, _branches(line)), key=lambda branch: branch.cycles.total()))
            called = _CALLED.search(line)
            if opcode == "call" and called:
                total.add(of(called[1]))
            operation = _OP_NAME.search(line)
            operation = operation[1] if operation else ""
            if known := _CYCLES.search(line):
                total.cycles[_kind(operation)] += int(known[1])
            elif opcode == "custom-call" and "tpu_custom_call" in line:
                if (cycles := splash(line, chip)) is None:
                    name_of = _NAME.match(line)
                    total.unknown_kernels[name_of[1] if name_of else operation] += 1
                else:
                    total.cycles["attention kernels"] += round(cycles)
            for opcode_sent, sent in _sent(opcode, line, computations):
                group, size = collectives.read(sent, opcode_sent, chips, data)
                if "%all-reduce-scatter" in line:  # a fusion of one and of the slice that is kept
                    group = group._replace(kind="reduce-scatter")
                total.counts[group] += 1
                total.sizes[group] += size
        return total

    return of(entry)


def splash(line: str, chip: Chip) -> float | None:
    """Cycles of one call of JAX's Pallas splash attention for TPUs; None: it is another kernel.

    Each of a head's t x s scores takes part in two products forward, and in five of the gradient,
    each as deep or as wide as a head filled up to 128: t s width / (units x side^2) cycles, or on a
    unit with more than 128 multipliers a side as many as if it had 128 that way. And in one
    exponential: 1024 a cycle and core. They are added, as if a chip did not do both at once; its
    cores share the heads.
    """
    found = _SPLASH.match(line)
    layouts = line.partition("operand_layout_constraints")[2]
    # Tables of the mask, in integers, come first; then queries and keys, their tokens last.
    operands = [s for kind, s in collectives.arrays(layouts) if kind in ("bf16", "f32")][:2]
    if found is None or [len(shape) for shape in operands] != [3, 3]:
        return None
    (heads, width, tokens), keys = operands
    filled = -(-width // FILLED) * FILLED
    multipliers = chip.units * chip.side * min(chip.side, FILLED)
    products = _SPLASH_PRODUCTS[found[1]] * filled / multipliers
    return heads * tokens * keys[2] * (products + 1 / (chip.cores * EXPONENTIALS))


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


def _sent(
    opcode: str, line: str, computations: dict[str, list[tuple[str, str]]]
) -> Iterator[tuple[str, str]]:
    """The collectives of an instruction: itself, or what is in a fusion or begins with it.

    One that runs beside other work is in several fusions: in one that starts it, in those of the
    work, and in one that waits. The number of its channel is no name for it, as others may share
    it: what starts it is counted.
    """
    if opcode.removesuffix("-start") in collectives.KINDS:
        yield opcode, line
    elif opcode in ("fusion", "async-start") and (called := _CALLED.search(line)):
        inside = computations.get(called[1], [])
        starts = any("AsyncCollectiveStart" in part for _, part in inside)
        for inner, part in inside:
            if starts or "async_collective_fusion_config" not in part:
                yield from _sent(inner, part, computations)


def _branches(line: str) -> list[str]:
    if listed := _BRANCHES.search(line):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return _TRUE_FALSE.findall(line)


def _turns(condition: list[tuple[str, str]]) -> int | None:
    """How often a loop turns that counts from 0 to the one constant of its condition."""
    constants = [found[1] for _, line in condition if (found := _CONSTANT.search(line))]
    return int(constants[0]) if len(constants) == 1 else None


def _kind(operation: str) -> str:
    return next((kind for kind, named in KINDS if named.search(operation)), "other")
