"""Random artifacts, built node by node: encodings that no calibration would choose, seams, and several outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pow2quant.artifact import Artifact
from pow2quant.pow2_constraints import Encoding, IntGrid
from tests.quantized_graphs import Graph

Shape = tuple[int, ...]

LARGEST = 2000
"""Values of one sample of what is enlarged."""


class Grower:
    """Adds random nodes to a graph. widths: of activations; weights take 2 to 8 bits."""

    def __init__(self, rng: np.random.Generator, widths: Sequence[int]) -> None:
        self.rng, self.widths = rng, widths
        self.g: Any = Graph()
        self.far = 40 if rng.random() < 0.1 else 3
        shape = (int(rng.integers(1, 5)), *map(int, rng.integers(4, 8, 2)))
        self.tensors: list[tuple[str, Shape, int]] = []
        k = int(rng.integers(-12, 3))
        self.add(self.g.input("x", shape, self.encoding(k)), shape, k)

    def encoding(self, k: int) -> Encoding:
        """Near 2^k for 8 bits, sometimes far from it."""
        bits = 8 if 8 in self.widths and self.rng.random() < 0.6 else int(self.rng.choice(self.widths))
        grid = IntGrid(bits, bool(self.rng.integers(2)))
        low, high = int(grid.qmin), int(grid.qmax)
        drift = int(self.rng.integers(-self.far, self.far + 1)) if self.rng.random() < 0.15 else 0
        zero = int(self.rng.choice([max(low, 0), (low + high) // 4 * 2, int(self.rng.integers(low, high + 1))]))
        exponent = int(np.clip(k + 8 - bits + drift, -120, 120))
        return Encoding(np.float32(2.0**exponent), np.int64(zero), grid)

    def add(self, name: str, shape: Shape, k: int) -> None:
        """A tensor whose values are about 2^(k + 7)."""
        self.tensors.append((name, shape, k))

    def maybe(self, k: int, share: float = 0.9) -> Encoding | None:
        """An encoding, or None: the tensor stays float."""
        return self.encoding(k) if self.rng.random() < share else None

    def grow(self, number: int) -> None:
        """Adds one node."""
        name, shape, k = self.tensors[-1 if self.rng.random() < 0.8 else int(self.rng.integers(len(self.tensors)))]
        kinds = ["conv", "conv", "relu", "sum", "sum", "product", "seam", "maximum", "average", "concat", "move", "pad"]
        kinds += ["constant", "extreme", "choice", "reduce", "resize", "gather"]
        getattr(self, f"_{self.rng.choice(kinds)}")(f"n{number}", name, shape, k)

    def _conv(self, name: str, x: str, shape: Shape, k: int) -> None:
        if x not in self.g.encodings:
            return
        channels, out, bits = shape[0], int(self.rng.integers(1, 6)), int(self.rng.integers(2, 9))
        depthwise = bool(self.rng.random() < 0.25)
        out = channels if depthwise else out
        size = int(self.rng.choice([1, 2, 3]))
        if min(shape[1:]) < size:
            return
        weight = self.rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, 1 if depthwise else channels, size, size))
        exponents = self.rng.integers(-bits, 2 - bits, out)
        bias = self.rng.integers(-(2**12), 2**12, out) if self.rng.integers(2) else None
        pad = int(self.rng.integers(2))
        more = {"k": exponents, "bits": bits, "pads": [pad] * 4, "group": channels if depthwise else 1}
        spread = int(np.log2(np.sqrt(weight[0].size)))
        grid = self.maybe(k + spread)
        self.g.layer("Conv", name, x, weight, bias, grid, **more)
        result = f"{name}.output"
        if grid is None and self.rng.random() < 0.8:
            result = self.g.node("Relu", f"{name}r", [result], self.encoding(k + spread))
        self.add(result, (out, *(n + 2 * pad - size + 1 for n in shape[1:])), k + spread)

    def _relu(self, name: str, x: str, shape: Shape, k: int) -> None:
        self.add(self.g.node("Relu", name, [x], self.maybe(k)), shape, k)

    def _sum(self, name: str, x: str, shape: Shape, k: int) -> None:
        pair = [x, self._other(shape)]
        self.add(self.g.node(str(self.rng.choice(["Add", "Sub"])), name, pair, self.maybe(k + 1)), shape, k + 1)

    def _product(self, name: str, x: str, shape: Shape, k: int) -> None:
        other = self._other(shape)
        more = next(t[2] for t in self.tensors if t[0] == other) + 7
        self.add(self.g.node("Mul", name, [x, other], self.maybe(k + more)), shape, k + more)

    def _other(self, shape: Shape) -> str:
        return str(self.rng.choice([name for name, s, _ in self.tensors if s == shape]))

    def _seam(self, name: str, x: str, shape: Shape, k: int) -> None:
        """Q-DQ-Q-DQ, also with operations between that do nothing."""
        kind = int(self.rng.integers(5))
        if kind == 1:
            x = self.g.node("Mul", f"{name}m", [x, self.g.constant(f"{name}.one", np.float32(1))])
        if kind == 2:
            x = self.g.node("Add", f"{name}a", [x, self.g.constant(f"{name}.zero", np.float32(0))])
        if kind == 3:
            x = self.g.node("Transpose", f"{name}t", [x], perm=[0, 2, 3, 1])
            self.add(self.g.node("Transpose", f"{name}u", [x], self.encoding(k), perm=[0, 3, 1, 2]), shape, k)
            return
        if kind == 4:
            ones = self.g.constant(f"{name}.shape", np.ones(4, np.int64))
            x = self.g.node("Expand", f"{name}e", [x, ones])
        self.add(self.g.node("Identity", name, [x], self.encoding(k)), shape, k)

    def _maximum(self, name: str, x: str, shape: Shape, k: int) -> None:
        if min(shape[1:]) < 3:
            return
        grid = self.g.encodings.get(x) if self.rng.random() < 0.7 else self.encoding(k)
        pad = int(self.rng.integers(2))
        more = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [pad] * 4}
        result = self.g.node("MaxPool", name, [x], grid, **more)
        self.add(result, (shape[0], *((n + 2 * pad - 2) // 2 + 1 for n in shape[1:])), k)

    def _average(self, name: str, x: str, shape: Shape, k: int) -> None:
        if min(shape[1:]) < 3:
            return
        more = {"kernel_shape": [2, int(self.rng.choice([2, 3]))], "strides": [1, 1]}
        result = self.g.node("AveragePool", name, [x], self.maybe(k), **more)
        self.add(result, (shape[0], shape[1] - 1, shape[2] - more["kernel_shape"][1] + 1), k)

    def _concat(self, name: str, x: str, shape: Shape, k: int) -> None:
        other, s, _ = self.tensors[
            int(self.rng.choice([i for i, t in enumerate(self.tensors) if t[1][1:] == shape[1:]]))
        ]
        self.add(self.g.node("Concat", name, [x, other], self.maybe(k), axis=1), (shape[0] + s[0], *shape[1:]), k)

    def _move(self, name: str, x: str, shape: Shape, k: int) -> None:
        grid = self.g.encodings.get(x) if self.rng.random() < 0.6 else self.maybe(k)
        result = self.g.node("Transpose", name, [x], grid, perm=[0, 1, 3, 2])
        self.add(result, (shape[0], shape[2], shape[1]), k)

    def _pad(self, name: str, x: str, shape: Shape, k: int) -> None:
        """Zeros in front of a pool, float or quantized."""
        pads = self.g.constant(f"{name}.pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
        x = self.g.node("Pad", f"{name}p", [x, pads], self.g.encodings.get(x) if self.rng.integers(2) else None)
        result = self.g.node("MaxPool", name, [x], self.maybe(k), kernel_shape=[2, 2], strides=[2, 2])
        self.add(result, (shape[0], *(n // 2 + 1 for n in shape[1:])), k)

    def _constant(self, name: str, x: str, shape: Shape, k: int) -> None:
        """An operand that is a constant: one value, one per channel, or a whole sample; sometimes float."""
        fitting = [(), (shape[0], 1, 1), shape]
        codes = self.rng.integers(-100, 100, fitting[self.rng.integers(3)])
        grid = Encoding(np.float32(2.0**k), np.int64(0), IntGrid(8, True)) if self.rng.random() < 0.85 else None
        operand = self.g.constant(f"{name}.c", codes if grid else np.float32(codes * 2.0**k), grid)
        op = str(self.rng.choice(["Add", "Sub", "Mul", "Max", "Min"]))
        k += {"Add": 1, "Sub": 1, "Mul": k + 7}.get(op, 0)
        pair = [x, operand] if self.rng.random() < 0.7 else [operand, x]
        self.add(self.g.node(op, name, pair, self.maybe(k)), shape, k)

    def _extreme(self, name: str, x: str, shape: Shape, k: int) -> None:
        pair = [x, self._other(shape)]
        self.add(self.g.node(str(self.rng.choice(["Max", "Min"])), name, pair, self.maybe(k)), shape, k)

    def _choice(self, name: str, x: str, shape: Shape, k: int) -> None:
        """By a bound of a tensor or a constant mask, of two tensors or of one and a number."""
        if self.rng.random() < 0.6:
            bound = self.g.constant(f"{name}.bound", np.float32(self.rng.integers(-100, 100) * 2.0**k))
            truth = self.g.node("Greater", f"{name}g", [self._other(shape), bound])
        else:
            fitting = [(shape[0], 1, 1), (1, *shape), shape[2:]]
            truth = self.g.constant(f"{name}.mask", self.rng.random(fitting[self.rng.integers(3)]) < 0.5)
        other = self._other(shape)
        if self.rng.random() < 0.3:
            other = self.g.constant(f"{name}.number", np.float32(self.rng.normal() * 2.0 ** (k + 7)))
        pair = [x, other] if self.rng.random() < 0.7 else [other, x]
        self.add(self.g.node("Where", name, [truth, *pair], self.maybe(k)), shape, k)

    def _reduce(self, name: str, x: str, shape: Shape, k: int) -> None:
        op = str(self.rng.choice(["ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean"]))
        axes = self.g.constant(f"{name}.axes", np.array([2, 3]))
        own = op in ("ReduceMax", "ReduceMin") and self.rng.random() < 0.6
        grid = self.g.encodings.get(x) if own else self.maybe(k + 4 * (op == "ReduceSum"))
        self.add(self.g.node(op, name, [x, axes], grid), (shape[0], 1, 1), k)

    def _resize(self, name: str, x: str, shape: Shape, k: int) -> None:
        scales = self.g.constant(f"{name}.scales", np.array([1, 1, 2, 2], np.float32))
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if 4 * np.prod(shape) <= LARGEST:
            grid = self.g.encodings.get(x) if self.rng.random() < 0.7 else self.maybe(k)
            result = self.g.node("Resize", name, [x, "", scales], grid, **how)
            self.add(result, (shape[0], 2 * shape[1], 2 * shape[2]), k)

    def _gather(self, name: str, x: str, shape: Shape, k: int) -> None:
        axis = int(self.rng.integers(1, 4))
        picked = self.rng.integers(0, shape[axis - 1], int(self.rng.integers(1, 5)))
        grid = self.g.encodings.get(x) if self.rng.random() < 0.7 else self.maybe(k)
        result = self.g.node("Gather", name, [x, self.g.constant(f"{name}.i", picked)], grid, axis=axis)
        self.add(result, tuple(len(picked) if i == axis - 1 else n for i, n in enumerate(shape)), k)


def artifact(rng: np.random.Generator, widths: Sequence[int] = range(2, 17), largest: int = 7) -> Artifact:
    """A random artifact of up to `largest` nodes; one output, or two."""
    grower = Grower(rng, widths)
    for number in range(int(rng.integers(1, largest + 1))):
        grower.grow(number)
    names = [name for name, _, _ in grower.tensors[1:]]
    if not names:
        x, _, k = grower.tensors[0]
        names = [grower.g.node("Relu", "last", [x], grower.encoding(k))]
    outputs = dict.fromkeys([names[-1], *([str(rng.choice(names))] if rng.random() < 0.25 else [])])
    result: Artifact = grower.g.artifact(*outputs)
    return result
