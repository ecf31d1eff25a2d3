"""Functions that exporters write as several nodes: found and written as one, as PyTorch has them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from pow2quant.frontends.onnx.file import OnnxFile, attribute

OWN = "pow2quant"
"""The domain of operations that ONNX does not have."""

COMMUTES = ("Add", "Mul")
FIRST_ONLY = ("Clip", "Expand", "ReduceL2", "ReduceMean")
"""Operations of which a pattern names the first operand only; the rest are bounds, a shape or axes."""

CELLS = ("LSTMCell", "GRUCell", "RNNCell")
TURNED = "_transposed"

Pattern = Any
"""A name (a tensor, the same one wherever it stands), a number (a constant), or (operation, *operands).

A name that begins with # is a constant, one with ? is any tensor, another one is computed. `Split.2` is the third
result. `Linear` is a Gemm, or a MatMul without a bias, with weights as (out, in). ("as", name, pattern) names a result.
"""


def _products(*factors: Pattern) -> list[Pattern]:
    """A product of three, however it is bracketed."""
    a, b, c = factors
    return [("Mul", ("Mul", a, b), c), ("Mul", ("Mul", a, c), b), ("Mul", ("Mul", b, c), a)]


_ERF = [("Add", ("Erf", u), 1.0) for u in (("Div", "x", 2**0.5), ("Mul", "x", 0.5**0.5))]
_CUBES = [("Pow", "x", 3.0), ("Mul", ("Mul", "x", "x"), "x"), ("Mul", "x", ("Pow", "x", 2.0))]
_TANH = [("Add", ("Tanh", ("Mul", ("Add", "x", ("Mul", cube, 0.044715)), (2 / np.pi) ** 0.5)), 1.0) for cube in _CUBES]
_SHIFTED = [("Clip", ("Add", "x", 3.0), 0.0, 6.0)]
_SIXTHS = [p for s in _SHIFTED for p in (("Div", s, 6.0), ("Mul", s, 1 / 6))]
_LENGTH = ("Clip", ("ReduceL2", "x"), 1e-12, None)
_CENTRED = ("Sub", "x", ("ReduceMean", "x"))
_VARIANCES = [("ReduceMean", ("Pow", _CENTRED, 2.0)), ("ReduceMean", ("Mul", _CENTRED, _CENTRED))]


def _cells(*biases: str) -> list[tuple[str, dict[str, Any], list[Pattern]]]:
    """One step of a recurrent layer. biases: of the input and of the state, or none.

    Without gates and biases it may be two layers on any number of dimensions.
    """
    x, h = ("Linear", "x", "#w_ih", *biases[:1]), ("Linear", "?h", "#w_hh", *biases[1:])
    both = ("Add", h, x)
    enter, forget, leave = (("Sigmoid", (f"Split.{i}", both)) for i in (0, 1, 3))
    memory = ("Add", ("Mul", forget, "?c"), ("Mul", enter, ("Tanh", ("Split.2", both))))
    reset, update = (("Sigmoid", ("Add", (f"Split.{i}", h), (f"Split.{i}", x))) for i in (0, 1))
    new = ("Tanh", ("Add", ("Split.2", x), ("Mul", ("Split.2", h), reset)))
    return [
        ("LSTMCell", {}, [("Mul", leave, ("Tanh", ("as", "memory", memory)))]),
        ("GRUCell", {}, [("Add", ("Mul", ("Sub", "?h", new), update), new)]),
        *(("RNNCell", {"activation": name}, [(name, both)]) for name in ("Tanh", "Relu") if biases),
    ]


PATTERNS: list[tuple[str, dict[str, Any], list[Pattern]]] = [
    ("Silu", {}, [("Mul", "x", ("Sigmoid", "x"))]),
    ("Mish", {}, [("Mul", "x", ("Tanh", ("Softplus", "x")))]),
    ("HardSwish", {}, [
        ("Mul", "x", ("HardSigmoid", "x")),
        *(("Mul", "x", s) for s in _SIXTHS),
        *(p for s in _SHIFTED for p in (("Div", ("Mul", "x", s), 6.0), ("Mul", ("Mul", "x", s), 1 / 6))),
    ]),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, _SIXTHS),
    ("Gelu", {"approximate": "none"}, [p for e in _ERF for p in _products("x", 0.5, e)]),
    ("Gelu", {"approximate": "tanh"}, [p for e in _TANH for p in _products("x", 0.5, e)]),
    ("LpNormalization", {"p": 2}, [("Div", "x", ("Expand", _LENGTH)), ("Div", "x", _LENGTH)]),
    ("Identity", {}, [("Where", ("IsNaN", "x"), 0.0, "x")]),
    ("LayerNormalization", {}, [
        ("Add", ("Mul", ("Div", _CENTRED, ("Sqrt", ("Add", v, "#eps"))), "#scale"), "#bias") for v in _VARIANCES
    ]),
    *_cells("#b_ih", "#b_hh"), *_cells(),
]  # fmt: skip
"""(operation, its attributes, how it is written by parts)."""

OPERANDS = ("x", "?h", "?c", "#w_ih", "#w_hh", "#b_ih", "#b_hh", "#scale", "#bias")
"""The names in patterns that the whole operation reads, in order."""

ROOTS = {pattern[0] for _, _, patterns in PATTERNS for pattern in patterns}


class Matcher:
    """Compares the nodes that compute a tensor with patterns."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.weights: dict[tuple[tuple[int, ...], bytes], str] = {}

    def match(self, name: str, pattern: Pattern) -> Iterator[dict[str, str]]:
        """Every way in which the tensor is what the pattern says: names of the pattern -> tensors."""
        yield from self._match(name, pattern, {})

    def _match(self, name: str, pattern: Pattern, bound: dict[str, str]) -> Iterator[dict[str, str]]:
        constant = self.file.constants.get(name)
        if isinstance(pattern, float):
            if constant is not None and constant.size == 1 and np.isclose(float(constant.reshape(())), pattern, 1e-5):
                yield bound
        elif isinstance(pattern, str):
            fits = pattern not in bound or bound[pattern] == name
            if fits and (pattern.startswith("?") or (constant is not None) == pattern.startswith("#")):
                yield {**bound, pattern: name}
        elif pattern[0] == "as":
            yield from ({**one, pattern[1]: name} for one in self._match(name, pattern[2], bound))
        else:
            node, (operation, _, at) = self.file.producers.get(name), pattern[0].partition(".")
            if node is None or operation not in (node.op_type, "Linear") or not self._fits(node, pattern):
                return
            if at and name not in node.output[int(at) :][:1]:
                return
            if operation == "Linear":
                yield from self._each([node.input[0], self._weight(node), *node.input[2:]], list(pattern[1:]), bound)
            else:
                yield from self._operands(node, pattern, bound)

    def _weight(self, node: NodeProto) -> str:
        """The weights of a product as (out, in). Exporters may write those of each step as a tensor of its own."""
        name = node.input[1]
        values = self.file.constants[name]
        if not attribute(node, "transB", 0):
            name, values = f"{name}{TURNED}", np.ascontiguousarray(values.T)
        name = self.weights.setdefault((values.shape, values.tobytes()), name)
        self.file.constants.setdefault(name, values)
        return name

    def _operands(self, node: NodeProto, pattern: Pattern, bound: dict[str, str]) -> Iterator[dict[str, str]]:
        wanted = pattern[1:2] if node.op_type in FIRST_ONLY else pattern[1:]
        given = list(node.input[: len(wanted)])
        if len(given) != len(wanted):
            return
        for order in permutations(given) if node.op_type in COMMUTES else [tuple(given)]:
            yield from self._each(list(order), list(wanted), bound)

    def _each(self, names: list[str], wanted: list[Pattern], bound: dict[str, str]) -> Iterator[dict[str, str]]:
        if not names:
            yield bound
            return
        for one in self._match(names[0], wanted[0], bound):
            yield from self._each(names[1:], wanted[1:], one)

    def _fits(self, node: NodeProto, pattern: Pattern) -> bool:
        """Attributes, where an operation has any that matter."""
        if pattern[0] == "Linear":
            weight = self.file.constants.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
            factors = {attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)}
            flat = weight is not None and weight.ndim == 2 and (node.op_type == "Gemm" or len(node.input) == 2)
            plain = factors == {1.0} and not attribute(node, "transA", 0)
            return flat and plain and len(node.input) == len(pattern) - 1
        if node.op_type == "Split":
            sizes = self.file.constants.get(node.input[1]) if len(node.input) > 1 else attribute(node, "split")
            return attribute(node, "axis", 0) in (1, -1) and (sizes is None or len({*np.asarray(sizes).tolist()}) == 1)
        if node.op_type == "HardSigmoid":
            return bool(abs(attribute(node, "alpha", 0.2) - 1 / 6) < 1e-6 and attribute(node, "beta", 0.5) == 0.5)
        if node.op_type == "Clip":
            pairs = zip(self._bounds(node), pattern[2:], strict=True)
            return all(a == b if a is None or b is None else bool(np.isclose(a, b, 1e-6, 0)) for a, b in pairs)
        if node.op_type == "ReduceL2":
            return len(self.axes(node) or ()) == 1 and attribute(node, "keepdims", 1) == 1
        if node.op_type == "ReduceMean":
            return self.axes(node) == [-1] and attribute(node, "keepdims", 1) == 1
        return True

    def _bounds(self, node: NodeProto) -> tuple[float | None, ...]:
        found: list[float | None] = [attribute(node, "min"), attribute(node, "max")]
        for i, name in enumerate(node.input[1:3]):
            value = self.file.constants.get(name)
            found[i] = None if value is None else float(value.reshape(()))
        return tuple(found)

    def axes(self, node: NodeProto) -> list[int] | None:
        """Along which dimensions a reduction goes, where that is known."""
        axes = attribute(node, "axes")
        if axes is None and len(node.input) > 1 and node.input[1] in self.file.constants:
            axes = self.file.constants[node.input[1]].reshape(-1).tolist()
        return None if axes is None else [int(a) for a in axes]


def recognize(file: OnnxFile) -> None:
    """Replaces the last node of every pattern by the whole operation; parts that nothing else reads go."""
    _fold_bias(file)
    matcher = Matcher(file)
    places = {tensor: i for i, node in enumerate(file.nodes) for tensor in node.output}
    found: list[NodeProto | None] = [*file.nodes]
    for node in file.nodes:
        whole = _whole(file, matcher, node) if node.op_type in ROOTS else None
        if whole is not None:
            written = sorted(places[tensor] for tensor in whole.output)
            found[written[0]] = whole
            for i in written[1:]:
                found[i] = None
    file.nodes = [node for node in found if node is not None]
    file.forget()


def _whole(file: OnnxFile, matcher: Matcher, node: NodeProto) -> NodeProto | None:
    for operation, attributes, patterns in PATTERNS:
        for pattern in patterns:
            for bound in matcher.match(node.output[0], pattern):
                inputs = [bound[name] for name in OPERANDS if name in bound]
                if operation in CELLS and not _is_cell(file, operation, bound):
                    continue
                if operation == "LayerNormalization":
                    if file.constants[bound["#scale"]].ndim != 1 or file.constants[bound["#bias"]].ndim != 1:
                        continue
                    attributes = {"axis": -1, "epsilon": float(file.constants[bound["#eps"]].reshape(()))}
                if operation == "LpNormalization":
                    length = file.producers[node.input[1]]
                    while length.op_type != "ReduceL2":
                        length = file.producers[length.input[0]]
                    attributes = {"p": 2, "axis": (matcher.axes(length) or [-1])[0]}
                domain = OWN if operation == "Silu" or operation in CELLS else ""
                outputs = [*node.output, *([bound["memory"]] if "memory" in bound else [])]
                return helper.make_node(operation, inputs, outputs, node.name, domain=domain, **attributes)
    return None


def _is_cell(file: OnnxFile, operation: str, bound: dict[str, str]) -> bool:
    """Whether the state's weights are square for each gate and, where two layers may be meant, read in steps."""
    (rows, columns), source = file.constants[bound["#w_hh"]].shape, bound["#w_hh"].removesuffix(TURNED)
    return rows % columns == 0 and (operation != "RNNCell" or len(file.readers[source]) > 1)


def _fold_bias(file: OnnxFile) -> None:
    """MatMul by a matrix of weights, then Add of one number per column: the bias becomes a third operand."""
    read = file.readers
    gone: set[int] = set()
    for node in file.nodes:
        weight = file.constants.get(node.input[1]) if node.op_type == "MatMul" and len(node.input) == 2 else None
        readers = read.get(node.output[0], [])
        if weight is None or weight.ndim != 2 or len(readers) != 1 or node.output[0] in file.outputs:
            continue
        add = readers[0]
        other = next((t for t in add.input if t != node.output[0]), "")
        bias = file.constants.get(other)
        if add.op_type == "Add" and bias is not None and bias.shape == (weight.shape[1],):
            node.input.append(other)
            node.output[0] = add.output[0]
            gone.add(id(add))
    file.nodes = [n for n in file.nodes if id(n) not in gone]
    file.forget()
