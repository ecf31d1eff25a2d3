"""How one step writes itself as C: a function's body out of constants, kernels and loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_text import comment, ctype, declared, indented, numbers, times, total
from pow2quant.integer.program import storage
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.integer.nodes import Window
    from pow2quant.integer.program import Ints, Program, Requantization, Step, Tensor
    from pow2quant.integer.ternary import Ternary

BLOCK = 64
"""So many sums are held at a time, on the stack."""

LANES = 64
"""Lengths of dot products are rounded up to a multiple of so many codes, or fewer: see `templates/lanes.c.j2`."""

SHARED = 256
"""Arrays of so many bytes are written once, as the steps of a recurrent layer have the same; others by each layer."""


class Surroundings(Protocol):
    """What a layer needs of the file it stands in. used: the structs that it declares."""

    program: Program
    arrays: list[Array]
    used: set[str]

    def kernel(self, name: str, **types: str) -> str: ...

    def constant(self, tensor: Tensor) -> str: ...

    def offsets(self, values: NDArray[np.int32], *, vectors: bool) -> str: ...


@dataclass(frozen=True)
class Array:
    """A constant array. vectors: only processors with dot instructions read it."""

    name: str
    comment: str
    values: NDArray[Any]
    vectors: bool = False

    @property
    def ctype(self) -> str:
        """The type of its values."""
        return f"{self.values.dtype}_t"

    @property
    def text(self) -> str:
        """Its values, in lines."""
        return numbers(self.values)


@dataclass
class Layer:
    """One step of a program, and what its function needs.

    spare: bytes that the memory has left over while the step runs.
    body: of the function, whose parameters are the inputs ("x", or "x0", "x1", …), "y" and the scratch memory;
    empty for a view. sums: the type of its sums. overwrites: inputs whose memory the result may take, because every
    code is read before the one at its place is written. scratch: memory it needs besides, (name, type, count); the
    parameter is the name's last word. flash: bytes of its constants. held: how often `BLOCK` sums, or the codes they
    become, are on the stack.
    """

    source: Surroundings
    step: Step
    index: int
    name: str
    spare: int = 0
    body: str = ""
    sums: str = ""
    overwrites: list[str] = field(default_factory=list)
    scratch: list[tuple[str, np.dtype[np.integer], int]] = field(default_factory=list)
    flash: int = 0
    held: int = 1

    @property
    def program(self) -> Program:
        """What it is a part of."""
        return self.source.program

    @property
    def output(self) -> Tensor:
        """The result."""
        return self.program.tensors[self.step.output]

    def input(self, index: int) -> Tensor:
        """An operand."""
        return self.program.tensors[self.step.inputs[index]]

    def operand(self, index: int) -> str:
        """What an operand is called inside of the function."""
        tensor = self.input(index)
        if tensor.constant is not None:
            return self.source.constant(tensor)
        return "x" if len(self.step.inputs) == 1 else f"x{self.step.inputs.index(tensor.name)}"

    def value(self, index: int, kind: str, place: str) -> str:
        """An operand's code less that of zero, as a number of type `kind`."""
        zero = self.input(index).zero
        code = f"({kind}){self.operand(index)}[{place}]"
        return f"({code} {'-' if zero > 0 else '+'} {abs(zero)})" if zero else code

    def kernel(self, name: str, **types: str) -> str:
        """A kernel's name, written out for these types and the step's rounding."""
        return self.source.kernel(name, **({} if self.step.rule is None else rounding(self.step.rule)), **types)

    def array(self, what: str, values: NDArray[Any], least: str = "int8", zeros: int = 0) -> Array:
        """A constant array in the narrowest signed type, but none narrower than `least`; `zeros` follow the values."""
        kind = np.promote_types(storage(min(int(values.min()), -1), int(values.max())), least)
        return self.typed_array(what, values.astype(kind), zeros)

    def typed_array(self, what: str, values: NDArray[Any], zeros: int = 0) -> Array:
        """A constant array in its own type; one that is there already, where it is large and has the same values."""
        own = np.append(values.reshape(-1), np.zeros(zeros, values.dtype))
        for array in self.source.arrays if own.nbytes >= SHARED else ():
            if array.values.dtype == own.dtype and np.array_equal(array.values, own):
                return array
        note = f"{comment(self.step.node)}: {what}, {' x '.join(map(str, values.shape)) or '1'}"
        note += f", and {zeros} zeros" if zeros else ""
        array = Array(f"{self.name}_{what}", note, own)
        self.flash += array.values.nbytes
        self.source.arrays.append(array)
        return array

    def offsets(self, values: Ints, *, vectors: bool) -> str:
        """A constant array of places in a map. vectors: only dot instructions need it."""
        return self.source.offsets(values.astype(np.int32).reshape(-1), vectors=vectors)

    def ternary(self, weight: Ternary) -> str:
        """The arrays of a ternary weight: its packed codes, and its shifts or 0."""
        packed = self.typed_array("weight", weight.packed())
        if not weight.is_shifted:
            return f"{packed.name}, 0"
        shifts = np.stack([weight.negative, weight.positive], 1).astype(np.int8)
        return f"{packed.name}, {self.typed_array('shifts', shifts).name}"

    def planes(self, window: Window, channels: int, share: int) -> Planes:
        """How a convolution's map is copied (see `templates/planes.c.j2`), into scratch memory "map".

        The map takes one part in `share` of what the layer reads and writes, and what else is there (`spare`); at least
        what one row of the result needs.
        """
        planes = Planes.of(window, channels, self.budget(share))
        self.source.used.add("Planes")
        self.scratch.append((f"{self.name} map", self.input(0).dtype, channels * planes.size + BLOCK))
        return planes

    def entries(self, largest: int, count: int) -> str:
        """Scratch memory "list" for `count` places below `largest`; the type of one."""
        kind: np.dtype[np.integer[Any]] = np.dtype("uint16" if largest < 2**16 else "int32")
        self.scratch.append((f"{self.name} list", kind, count))
        return f"{kind}_t"

    def budget(self, share: int) -> int:
        """So many codes of the input's type are one part in `share` of what the layer reads and writes, and `spare`."""
        x = self.input(0)
        return (x.size + self.output.size) // share + self.spare // x.dtype.itemsize

    def patches(self, window: Window, channels: int, least: int) -> tuple[str, int, int]:
        """Scratch memory for the patches under a window, and for the columns under them; how many, and how many codes.

        They take a quarter of what the layer reads and writes, and what else is there (`spare`); at least eight patches
        and `least` codes.
        """
        x = self.input(0)
        column = channels * window.kernel[0]
        row = -(-window.kernel[1] * column // LANES) * LANES
        most = self.budget(4)

        def columns(patches: int) -> int:
            across = min(patches, window.result[1]) - 1
            return across * window.strides[1] + (window.kernel[1] - 1) * window.dilations[1] + 1

        count = BLOCK
        while count > 8 and count * row + columns(count) * column > most:
            count -= 8
        count = min(count, math.prod(window.result))
        size = max(least, count * row + columns(count) * column)
        self.scratch.append((f"{self.name} patches", x.dtype, size))
        return "patches", count, size

    def accumulator(self, bound: int, rule: Requantization) -> str:
        """The type that holds every sum, none beyond `bound`, on its way to codes.

        Raises UnsupportedModelError where 64 bits are not enough.
        """
        up, down = max(0, -int(rule.shift.min())), int(_shifts(rule).max())
        largest = (bound << up) + (1 << max(0, down - 1)) + abs(rule.zero) + max(abs(rule.low), abs(rule.high))
        if bound << up >= 2**61:
            raise UnsupportedModelError(f"{self.step.node}: its sums may reach {bound << up}; C is written up to 2^61")
        self.sums = "int32_t" if largest < 2**31 and down <= 30 else "int64_t"
        return self.sums

    def window(self, window: Window, channels: int) -> str:
        """The declaration of the constant `window`."""
        self.source.used.add("Window")
        values = {"channels": channels, "height": window.size[0], "width": window.size[1]}
        values |= dict(zip(("kernel_height", "kernel_width"), window.kernel, strict=True))
        for name, (y, x) in (("stride", window.strides), ("dilation", window.dilations)):
            values |= {f"{name}_y": y, f"{name}_x": x}  # in the struct's order, as C++ wants it
        values |= dict(zip(("top", "left"), window.before, strict=True))
        values |= dict(zip(("rows", "columns"), window.result, strict=True))
        return declared("Window", "window", values)

    def rule(self, rule: Requantization) -> str:
        """The declaration of the constant `rule`."""
        self.source.used.add("Rule")
        shift = self.typed_array("shift", _shifts(rule).astype(np.int8).reshape(-1)).name
        numbers = {"zero": rule.zero, "low": rule.low, "high": rule.high}
        return declared("Rule", "rule", {"shift": shift, "per_channel": int(rule.shift.ndim > 0), **numbers})

    def broadcast(self) -> Loops:
        """Loops through both operands and the output, operands repeated as in ONNX."""
        shape = (1, *self.output.shape)
        tensors = [self.input(i) for i in range(len(self.step.inputs))]
        shapes = [(1, *t.shape) if t.constant is None else t.shape for t in tensors]
        views = [np.broadcast_to(np.arange(t.size).reshape(s), shape) for t, s in zip(tensors, shapes, strict=True)]
        return Loops.through([*views, np.arange(self.output.size).reshape(shape)])

    def moves(self, index: int, loops: Loops) -> str:
        """A body that copies codes of one operand. loops: through it and the output."""
        *outer, (count, read, write) = loops.nest
        x = self.operand(index)
        if (read, write) == (1, 1) and self.input(index).dtype == self.output.dtype:
            source, target = loops.starts_behind(len(outer))
            copied = f"memcpy({total('y', target)}, {total(x, source)}, {count} * sizeof *y);"
            return "\n".join(loops.around(len(outer), [copied]))
        source, target = loops.starts_behind(len(outer) + 1)
        return "\n".join(loops.around(len(outer) + 1, [f"y[{target}] = {x}[{source}];"]))

    def elementwise(self, loops: Loops, term: Callable[..., str], rule: Requantization, bound: int) -> str:
        """A body that requantizes `term(type of the sums, *indices of the operands)` for every element.

        loops: through the operands and, last, the output. bound: of the terms.
        """
        self._note_overwritten(loops)
        a = self.accumulator(bound, rule)
        requantize = self.source.kernel("requantize", a=a, y=ctype(self.output), **rounding(rule))
        numbers = f"{int(_shifts(rule))}, {rule.zero}, {rule.low}, {rule.high}"
        *outer, (count, *strides) = loops.nest
        long = count > BLOCK
        n, m = ("n", "(first + m)") if long else (str(count), "m")
        starts = loops.starts_behind(len(outer))
        places = [total(start, times(m, stride)) for start, stride in zip(starts, strides, strict=True)]
        local = [f"{a} sum[{min(BLOCK, count)}];"]
        body = [f"for (int32_t m = 0; m < {n}; m++)", f"    sum[m] = {term(a, *places[:-1])};"]
        if count > 1 and strides[-1] != 1:
            local.append(f"{ctype(self.output)} codes[{min(BLOCK, count)}];")
            body.append(f"{requantize}(codes, sum, {n}, {numbers});")
            body += [f"for (int32_t m = 0; m < {n}; m++)", f"    y[{places[-1]}] = codes[m];"]
        else:
            body.append(f"{requantize}({total('y', starts[-1], 'first' if long else '')}, sum, {n}, {numbers});")
        if long:
            step = f"n = {count} - first < {BLOCK} ? {count} - first : {BLOCK};"
            body = [f"for (int32_t first = 0, n; first < {count}; first += n) {{", *indented([step, *body]), "}"]
        return "\n".join([*local, *loops.around(len(outer), body)])

    def _note_overwritten(self, loops: Loops) -> None:
        """Operands that are read just where the output is written, from its first code to its last."""
        if math.prod(loop[0] for loop in loops.nest) != self.output.size:
            return
        for i in range(len(loops.starts) - 1):
            together = loops.starts[i] == loops.starts[-1] and all(loop[1 + i] == loop[-1] for loop in loops.nest)
            if together and self.input(i).constant is None:
                self.overwrites.append(self.step.inputs[i])


@dataclass(frozen=True)
class Planes:
    """A copied map, as the struct of `templates/planes.c.j2`. taps: where a kernel's weights begin in a channel."""

    lines: int
    count_y: int
    count_x: int
    high: int
    wide: int
    taps: Sequence[int]

    @property
    def size(self) -> int:
        """Codes of a channel."""
        return self.count_y * self.count_x * self.high * self.wide

    @property
    def declared(self) -> str:
        """The declaration of the constant `planes`."""
        names = ("lines", "count_y", "count_x", "high", "wide", "size")
        return declared("Planes", "planes", {name: getattr(self, name) for name in names})

    @classmethod
    def of(cls, window: Window, channels: int, most: int) -> Planes:
        """As many rows of the result at a time as `most` codes hold, at least one."""
        (sy, sx), (dy, dx), (kh, kw) = window.strides, window.dilations, window.kernel
        count_y, count_x = min(sy, (kh - 1) * dy + 1), min(sx, (kw - 1) * dx + 1)
        wide, more = window.result[1] + (kw - 1) * dx // sx, (kh - 1) * dy // sy
        lines = max(1, min(window.result[0], most // (channels * count_y * count_x * wide) - more))
        high = lines + more
        taps = [
            ((i * dy % sy * count_x + j * dx % sx) * high + i * dy // sy) * wide + j * dx // sx
            for i in range(kh)
            for j in range(kw)
        ]
        return cls(lines, count_y, count_x, high, wide, taps)


@dataclass(frozen=True)
class Loops:
    """Nested loops through several arrays.

    nest: (count, stride in every array), outermost first; at least one. starts: flat indices.
    """

    nest: Sequence[tuple[int, ...]]
    starts: Sequence[int]

    @classmethod
    def through(cls, views: Sequence[NDArray[np.int64]]) -> Loops:
        """Through views, of equal shape, of flat indices."""
        return cls(nested(views) or [(1, *[1] * len(views))], [int(v.flat[0]) for v in views])

    def starts_behind(self, depth: int) -> list[str]:
        """The flat index in every array that the `depth` outermost loops have reached."""
        return [
            total(str(start or ""), *(times(f"i{d}", loop[1 + array]) for d, loop in enumerate(self.nest[:depth])))
            for array, start in enumerate(self.starts)
        ]

    def around(self, depth: int, body: list[str]) -> list[str]:
        """The `depth` outermost loops around some lines."""
        for d in reversed(range(depth)):
            head = f"for (int32_t i{d} = 0; i{d} < {self.nest[d][0]}; i{d}++) {{"
            body = [head, *indented(body), "}"]
        return body


def nested(views: Sequence[NDArray[np.int64]]) -> list[tuple[int, ...]]:
    """The loops, (count, stride in every array) each, through views, of equal shape, of flat indices; as few as do."""
    found: list[tuple[int, ...]] = []
    for count, *strides in zip(views[0].shape, *(v.strides for v in views), strict=True):
        steps = tuple(s // views[0].itemsize for s in strides)
        if found and count > 1 and found[-1][1:] == tuple(count * s for s in steps):
            found[-1] = (found[-1][0] * count, *steps)
        elif count > 1:
            found.append((count, *steps))
    return found


def rounding(rule: Requantization) -> dict[str, str]:
    """What a kernel's template takes as `rounding`; half to even is not named."""
    return {} if rule.rounding == HALF_EVEN else {"rounding": rule.rounding}


def folded(weight: Ints, bias: Ints, x: Tensor) -> tuple[Ints, int]:
    """The bias of sums of w * q instead of w * (q - zero), and a bound on these sums with it, in any order.

    weight: (C_out, …). bias: (C_out,).
    """
    rows = weight.reshape(len(weight), -1)
    other = bias - x.zero * rows.sum(1)
    return other, int((np.abs(rows).sum(1) * max(abs(x.low), abs(x.high)) + np.abs(other)).max())


def _shifts(rule: Requantization) -> Ints:
    """The shifts. Beyond 62 nothing that 64 bits hold here is left."""
    return np.minimum(rule.shift, 62)
