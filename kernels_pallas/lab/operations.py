"""The operations of a program compiled for a TPU: their kind, source line, estimated cycles, HBM traffic and FLOPs."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from kernels_pallas.hlo import computations, group_of, trip_count
from kernels_pallas.lab.estimates import cycles_of

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
TILE = re.compile(r"T\((\d+),(\d+)\)")
ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
Kind = Literal["matmul", "kernel", "prefetch", "other"]


class Operation(NamedTuple):
    """One instruction of a program, loops multiplied out.

    Args:
      name: in the program.
      kind: "matmul" (a product, or a fusion with one), "kernel" (a Pallas call), "prefetch" (a copy between HBM and VMEM that runs
        beside others) or "other".
      source: the innermost lines of the project in its trace, `folder/file.py:line < caller.py:line`; a fusion has the most
        frequent one of its parts. Empty: the compiler made it.
      cycles: the compiler's estimate, 0 for kernels.
      hbm_bytes: operands and results that are in HBM, tiles padded. Of an operand that is only sliced, and of a result that is
        updated in place, the part counts.
      flops: of its products.
      grid_steps, token_heads: of a kernel of ours, how many it has, and its tokens times heads; 0: another library's, or no kernel.
      form: the types of its result and its operands: calls of one form are compiled once.
    """

    name: str
    kind: Kind
    source: str
    cycles: float
    hbm_bytes: float
    flops: float
    grid_steps: int
    token_heads: int
    form: str


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    line: str

    @property
    def calls(self) -> str | None:
        match = re.search(r"\bcalls=%?([\w.\-]+)", self.line)
        return match.group(1) if match else None


def array_bytes(type_text: str, *, hbm_only: bool = True) -> int:
    """Returns the bytes of the arrays in an HLO type, tiles padded.

    Args:
      hbm_only: whether those in VMEM (memory space 1) count as 0.
    """
    total = 0
    for dtype, dims, layout in ARRAY.findall(type_text):
        if dtype not in ITEM or (hbm_only and "S(1)" in layout):
            continue
        sizes = [int(n) for n in dims.split(",") if n]
        order = [int(n) for n in layout.partition(":")[0].split(",") if n] or list(range(len(sizes)))[::-1]
        if (tile := TILE.search(layout)) and len(order) > 1:
            for axis, size in zip(order, (int(tile.group(2)), int(tile.group(1))), strict=False):
                sizes[axis] = -(-sizes[axis] // size) * size
        total += ITEM[dtype] * math.prod(sizes)
    return total


def _elements(type_text: str) -> int:
    match = ARRAY.search(type_text)
    return math.prod(int(n) for n in match.group(2).split(",") if n) if match else 0


class _Program:
    """The instructions of a program by computation, and what is asked of them."""

    def __init__(self, hlo: str, folders: Sequence[str]):
        bodies, self.entry = computations(hlo)
        self.lines = bodies
        self.bodies = {name: [found for line in lines if (found := _parse(line))] for name, lines in bodies.items()}
        self.types = {i.name: i.type for body in self.bodies.values() for i in body}
        self.frame = _source_lines(hlo, folders)
        self._hlo = hlo

    def stated(self, i: _Instruction, number: str) -> int:
        """Returns a number of a kernel's metadata, which has lines of its own behind the call's; 0: it has none."""
        if "kernel_metadata={" not in i.line:
            return 0
        begin = self._hlo.index(i.line) + len(i.line)
        match = re.search(rf'"{number}": ?"(\d+)"', self._hlo[begin : self._hlo.index("}", begin)])
        return int(match.group(1)) if match else 0

    def parts(self, name: str) -> tuple[_Instruction, ...]:
        """Returns the instructions of a fused computation, and of those that it calls."""
        return tuple(part for i in self.bodies.get(name, ()) for part in ((i, *self.parts(i.calls)) if i.calls else (i,)))

    def inside(self, i: _Instruction) -> tuple[_Instruction, ...]:
        return self.parts(i.calls) if i.calls else (i,)

    def source(self, i: _Instruction) -> str:
        frames = (match.group(1) for part in self.inside(i) if (match := re.search(r"stack_frame_id=(\d+)", part.line)))
        found = collections.Counter(place for frame in frames if (place := self.frame(int(frame))))
        return found.most_common(1)[0][0] if found else ""

    def flops(self, i: _Instruction) -> float:
        """Returns the FLOPs of products without batch dimensions: 2 times the roots of the sizes' product."""
        products = [part for part in self.inside(i) if part.op in ("convolution", "dot")]
        sizes = [[_elements(self.types.get(x, "")) for x in (part.name, *part.operands[:2])] for part in products]
        return sum(2 * math.sqrt(math.prod(three)) for three in sizes)

    def hbm_bytes(self, i: _Instruction) -> float:
        """Returns the bytes that an operation moves from and to HBM."""
        body = self.bodies.get(i.calls or "", [])
        parameters = {group_of(r"parameter\((\d+)\)", x.line): x.name for x in body if x.op == "parameter"}
        total = 0.0
        updated = [x for x in body if x.op == "dynamic-update-slice"] if i.calls else [i] if i.op == "dynamic-update-slice" else []
        in_place = {x.operands[0] for x in updated}
        for number, operand in enumerate(i.operands):
            own = self.types.get(operand, "")
            name = parameters.get(str(number), "")
            users = [x for x in body if name in x.operands]
            if "S(1)" in own or (users and name in in_place and len(users) == 1) or (not body and operand in in_place):
                continue
            if users and all(x.op in ("slice", "dynamic-slice") for x in users):
                total += sum(array_bytes(x.type, hbm_only=False) for x in users)
            else:
                total += array_bytes(own)
        written = array_bytes(i.type)
        for x in updated:
            if "S(1)" not in i.type:
                written += array_bytes(self.types.get(x.operands[1], ""), hbm_only=False) - array_bytes(x.type, hbm_only=False)
        return total + max(written, 0)


def _parse(line: str) -> _Instruction | None:
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    operands = tuple(re.findall(r"%([\w.\-]+)", match.group(4).split("), ")[0]))
    return _Instruction(match.group(1), match.group(2), match.group(3), operands, line)


def _source_lines(hlo: str, folders: Sequence[str]) -> Callable[[int], str]:
    """Returns a function from a stack frame's number to its innermost two lines in files below `folders`."""

    def table(name: str) -> dict[int, str]:
        match = re.search(rf"^{name}\n(.*?)\n\n", hlo, re.S | re.M)
        rows = (row.split(" ", 1) for row in match.group(1).splitlines()) if match else ()
        return {int(number): text for number, text in rows}

    files, locations, frames = (table(name) for name in ("FileNames", "FileLocations", "StackFrames"))

    def number(field: str, text: str) -> int:
        match = re.search(rf"{field}=(\d+)", text)
        return int(match.group(1)) if match else 0

    def places(frame: int) -> Iterator[str]:
        while frame in frames:
            location = locations.get(number("file_location_id", frames[frame]), "")
            path = files.get(number("file_name_id", location), "").strip('"')
            for folder in folders:
                if f"/{folder}/" in path:
                    yield f"{path.rpartition(f'/{folder}/')[2]}:{number('line', location)}"
            parent = number("parent_frame_id", frames[frame])
            frame = parent if parent != frame else 0

    @functools.cache
    def of_frame(frame: int) -> str:
        return " < ".join(list(dict.fromkeys(places(frame)))[:2])

    return of_frame


def read_operations(hlo: str, folders: Sequence[str] = ("hybrid_jax", "kernels_pallas")) -> list[Operation]:
    """Returns the operations of a program's text that cost anything, in its order; of a conditional, the branch with most traffic.

    Args:
      hlo: the optimized program.
      folders: those whose files `Operation.source` names.
    """
    program = _Program(hlo, folders)

    def operation(i: _Instruction, times: int) -> Operation:
        flops = program.flops(i)
        kind: Kind = "other"
        if 'custom_call_target="tpu_custom_call"' in i.line:
            kind = "kernel"
        elif i.op.endswith("-start"):
            kind = "prefetch"
        elif flops:
            kind = "matmul"
        return Operation(
            name=i.name,
            kind=kind,
            source=program.source(i),
            cycles=times * cycles_of(i.line),
            hbm_bytes=times * (_copied(i, program) if kind == "prefetch" else program.hbm_bytes(i)),
            flops=times * flops,
            grid_steps=times * program.stated(i, "grid_steps"),
            token_heads=times * program.stated(i, "token_heads"),
            form=" ".join([i.type, *(program.types.get(x, "") for x in i.operands)]),
        )

    def walk(computation: str, times: int) -> list[Operation]:
        found: list[Operation] = []
        for i in program.bodies.get(computation, ()):
            if i.op == "while":
                body, condition = (group_of(rf"{part}=%?([\w.\-]+)", i.line) for part in ("body", "condition"))
                found += walk(body, times * trip_count(i.line, program.lines.get(condition, [])))
            elif i.op in ("call", "conditional"):
                branches = [walk(name, times) for name in _called(i.line)]
                found += max(branches, key=lambda ops: sum(o.hbm_bytes for o in ops), default=[])
            elif i.op not in FREE and not i.op.endswith("-done"):
                found.append(operation(i, times))
        return found

    return walk(program.entry, 1)


def _called(line: str) -> list[str]:
    """Returns the computations that a call or a conditional names."""
    found = re.search(r"(?:to_apply|branch_computations|called_computations)=\{?([^}\s]*(?:, %[^}\s]*)*)", line)
    several = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
    return several or (re.findall(r"[\w.\-]+", found.group(1)) if found else [])


def _copied(i: _Instruction, program: _Program) -> float:
    """Returns the bytes that an asynchronous copy moves from or to HBM: those of the smaller side."""
    sides = [array_bytes(match.group(0), hbm_only=False) for match in ARRAY.finditer(i.type)][:2]
    source = [array_bytes(program.types.get(x, ""), hbm_only=False) for x in i.operands[:1]]
    return min([n for n in (*sides, *source) if n] or [0])
