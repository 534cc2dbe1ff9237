"""Reads the text of an optimized XLA program for a GPU: its kernels, the bytes that they move, their FLOPs.

A kernel's bytes are those of its operands and results, so data that the cache would serve count each time. Of an
operand from which a kernel only takes slices or single rows, these count. Needs no JAX.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Array(NamedTuple):
    """An array's type.

    Attributes:
      dtype: HLO's name, as in `f32[128,10]`.
      shape: sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes; rows are not padded."""
        return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text.

    Attributes:
      name: unique in the program.
      opcode: as in HLO's documentation.
      results: the array, or those of the tuple, that it computes.
      arguments: the text between its parentheses.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions, in the same computation, whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def nbytes(self) -> int:
        """Total size of the results."""
        return sum(array.nbytes for array in self.results)

    @property
    def scope(self) -> str:
        """JAX's name stack and primitive: `jit(step)/jvp(AlexNet)/conv1/conv_general_dilated`."""
        return self.attribute(r'op_name="([^"]*)"')

    def attribute(self, pattern: str) -> str:
        """What the pattern's group matches among the attributes, or an empty text."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


Computation = Mapping[str, Instruction]


class Program(NamedTuple):
    """A module.

    Attributes:
      computations: by name, each with its instructions by name, in the order of execution.
      entry: name of the one that runs.
    """

    computations: Mapping[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a GPU program.

    Attributes:
      name: the instruction's.
      target: opcode, or what a custom call calls.
      runs: how often it runs in one execution of the program.
      bytes_read: per run.
      bytes_written: per run.
      flops: of convolutions and matrix products per run; two per multiplication.
      dtype: of what these multiply; None if there are none.
      scopes: JAX's scopes of all operations in it.
    """

    name: str
    target: str
    runs: int
    bytes_read: int
    bytes_written: int
    flops: int
    dtype: str | None
    scopes: tuple[str, ...]


# These compute nothing, or what they do is counted elsewhere.
_NO_KERNEL = (
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
)
_LINE = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$")
_HEAD = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_CALLS = r"calls=%([\w.\-]+)"


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: the text is not that of an HLO module.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head["name"]
            computations[current] = {}
            entry = current if head["entry"] else entry
        elif match := _LINE.match(line):
            arguments, attributes = _split_at_parenthesis(match["rest"])
            computations[current][match["name"]] = Instruction(
                match["name"], match["opcode"], arrays(match["type"]), arguments, attributes, bool(match["root"])
            )
    if not entry:
        raise ValueError("not the text of an HLO module: it has no ENTRY")
    return Program(computations, entry)


def arrays(type_text: str) -> tuple[Array, ...]:
    """The arrays in an HLO type: `f32[16,4096]{1,0}` or a tuple of such types."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_text)
    return tuple(Array(dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in found)


def kernels(program: Program) -> list[Kernel]:
    """The kernels in the order in which they are launched; those in a loop count once for each of its turns.

    A conditional counts as its first branch, a loop whose length is not known as one turn.
    """
    return list(_kernels(program, program.computations[program.entry], 1))


def instructions(program: Program, computation: Computation) -> Iterator[tuple[Instruction, Computation]]:
    """The instructions of a fused computation and of those nested in it, each with the computation that it is in."""
    for instruction in computation.values():
        yield instruction, computation
        if instruction.opcode == "fusion":
            yield from instructions(program, program.computations[instruction.attribute(_CALLS)])


def _kernels(program: Program, computation: Computation, runs: int) -> Iterator[Kernel]:
    for one in computation.values():
        parts: list[tuple[str, int]] = []
        if one.opcode in _NO_KERNEL or one.opcode.endswith("-done"):
            continue
        if one.opcode == "while":
            turns = int(one.attribute(r'known_trip_count":\{"n":"(\d+)"') or 1)
            parts = [(r"body=%([\w.\-]+)", turns), (r"condition=%([\w.\-]+)", turns + 1)]
        elif one.opcode == "conditional":
            parts = [(r"(?:branch_computations=\{|true_computation=)%([\w.\-]+)", 1)]
        elif one.opcode in ("call", "async-start"):
            parts = [(r"(?:to_apply|calls)=%([\w.\-]+)", 1)]
        for pattern, count in parts:
            yield from _kernels(program, program.computations[one.attribute(pattern)], runs * count)
        if not parts:
            yield _kernel(program, computation, one, runs)


def _kernel(program: Program, computation: Computation, instruction: Instruction, runs: int) -> Kernel:
    operands = [computation[name] for name in instruction.operands]
    read, written = sum(operand.nbytes for operand in operands), instruction.nbytes
    inside: list[tuple[Instruction, Computation]] = [(instruction, computation)]
    target = instruction.attribute(r'custom_call_target="([^"]+)"') or instruction.opcode
    if fused := instruction.attribute(_CALLS):
        body = program.computations[fused]
        read, written = _fusion_bytes(body, operands)
        inside = list(instructions(program, body))
        target = instruction.attribute(r"kind=(\w+)")
    flops, dtype = 0, None
    for one, around in inside:
        if count := _flops(one, around):
            flops, dtype = flops + count, around[one.operands[0]].results[0].dtype
    scopes = tuple(one.scope for one, _ in inside if one.scope)
    return Kernel(instruction.name, target, runs, read, written, flops, dtype, scopes)


def _split_at_parenthesis(rest: str) -> tuple[str, str]:
    """The text before the parenthesis that closes, and what follows."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    raise ValueError(f"not the text of an HLO module: a parenthesis is not closed: {rest[:80]}")


def _bits(dtype: str) -> int:
    if match := re.fullmatch(r"(?:bf|[fsuc])(\d+)\w*", dtype):
        return int(match[1])
    if dtype not in ("pred", "token"):
        raise ValueError(f"HLO type {dtype}: its size is not known")
    return 8 if dtype == "pred" else 0


def _fusion_bytes(body: Computation, operands: Sequence[Instruction]) -> tuple[int, int]:
    """Bytes that a fusion reads and writes."""
    read = 0
    for one in body.values():
        if one.opcode == "parameter":
            read += min(operands[int(one.arguments)].nbytes, _bytes_taken(body, one))
    root = next(one for one in body.values() if one.is_root)
    written = 0
    for name in root.operands if root.opcode == "tuple" else [root.name]:
        result = body[name]
        while result.opcode == "bitcast":
            result = body[result.operands[0]]
        updates = result.opcode == "dynamic-update-slice"  # in place: only that part is written
        written += body[result.operands[1]].nbytes if updates else result.nbytes
    return read, written


def _bytes_taken(body: Computation, source: Instruction) -> int:
    """Bytes that a fusion takes of one of its inputs, at most; data taken twice counts twice."""
    total = 0
    for one in body.values():
        if source.name in one.operands:
            is_data = one.operands[0] == source.name
            if one.opcode == "bitcast":
                total += _bytes_taken(body, one)
            elif one.opcode in ("slice", "dynamic-slice", "gather") and is_data:
                total += one.nbytes
            elif one.opcode != "dynamic-update-slice" or not is_data:
                total += source.nbytes
    return total


def _flops(one: Instruction, around: Computation) -> int:
    """FLOPs of a matrix product, or of one of cuDNN's convolutions; 0 for all other instructions."""
    shapes = [around[name].results[0].shape for name in one.operands if around[name].results]
    out = one.results[0].shape if one.results else ()
    if one.opcode == "dot":
        contracted = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",")
        return 2 * math.prod(out) * math.prod(shapes[0][int(axis)] for axis in contracted)
    if "cudnn$conv" not in one.attribute(r'custom_call_target="([^"]+)"'):
        return 0
    # Whatever is computed, each output of the forward pass takes as many products as the kernel has for one feature.
    target, labels = (one.attribute(pattern) for pattern in (r'target="([^"]+)"', r"dim_labels=\w+_(\w+)->"))
    output, kernel = out, shapes[1]
    if "BackwardFilter" in target:
        output, kernel = shapes[1], out
    elif "BackwardInput" in target:
        output = shapes[0]
    return 2 * math.prod(output) * math.prod(kernel) // kernel[labels.index("o")]
