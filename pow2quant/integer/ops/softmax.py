"""Softmax: the largest code, a table of exponentials, their sum, at most one division per row (`functions`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.functions import FINE, HIDDEN, Softmax
from pow2quant.integer.c_text import ctype
from pow2quant.integer.nodes import title
from pow2quant.integer.program import Step, storage

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Requantization, Tensor


@dataclass(frozen=True, eq=False)
class SoftmaxStep(Step):
    """y = requantize(p), p in units of 2^-24, along one axis. table: E for d = 0, 1, …, and 0 for all that follow."""

    definition: Softmax
    table: Ints
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        defined = self.definition
        codes, *keep = (
            x.astype(np.int64).reshape(-1, *program.tensors[name].shape)
            for name, x in zip(self.inputs, inputs, strict=True)
        )
        kept = defined.kept()
        if kept is not None:
            codes = codes - HIDDEN * ~kept
        if keep:
            codes = codes - HIDDEN * (keep[0] <= _half(program.tensors[self.inputs[1]]))
        apart = codes.max(defined.axis, keepdims=True) - codes
        entries = self.table[np.minimum(apart, len(self.table) - 1)]
        if defined.levels:
            powers = defined.powers()
            quotient = 2 * entries.sum(defined.axis, keepdims=True) // np.maximum(3 * entries, 1)
            p = np.where(entries, powers[np.minimum(quotient, len(powers) - 1)], 0)
            return self.requantization(p)
        reciprocal = (1 << defined.reciprocal_bits) // entries.sum(defined.axis, keepdims=True)
        p = entries * reciprocal >> (defined.reciprocal_bits - FINE)
        return self.requantization(p)

    def emit_c(self, layer: Layer) -> str:
        x, defined, masked = layer.input(0), self.definition, len(self.inputs) > 1
        kind = layer.accumulator(self.bound(layer.program), self.requantization)
        entries = layer.typed_array("table", self.table.astype(storage(0, int(self.table.max()))))
        length = x.shape[defined.axis]
        inner = math.prod(x.shape[defined.axis + 1 :]) if defined.axis < -1 else 1
        kept = defined.kept()
        sums = "uint32_t" if defined.is_single or defined.levels else "uint64_t"
        softmax = layer.kernel(
            "softmax",
            x=ctype(x),
            t=entries.ctype,
            s=sums,
            a=kind,
            y=ctype(layer.output),
            k=ctype(layer.input(1)) if masked else "uint8_t" * (kept is not None),
            powers="powers" * bool(defined.levels),
        )
        numbers = [x.size // length // inner, length, inner, len(self.table) - 1]
        numbers += [defined.levels] if defined.levels else [defined.reciprocal_bits, defined.reciprocal_bits - FINE]
        arguments = f"{layer.operand(0)}, y, {', '.join(map(str, numbers))}, {entries.name}, &rule"
        if masked:
            arguments += f", {layer.operand(1)}, {layer.input(1).size}, {_half(layer.input(1))}, {HIDDEN}"
        elif kept is not None:
            mask = _repeated(kept, x.shape)
            arguments += f", {layer.typed_array('kept', mask.astype(np.uint8)).name}, {mask.size}, 0, {HIDDEN}"
        return f"{layer.rule(self.requantization)}\n{softmax}({arguments});"

    def bound(self, program: Program) -> int:
        return int(2**FINE)

    def work(self, program: Program) -> int:
        return 3 * program.tensors[self.output].size


def _repeated(kept: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask as the tensor's last dimensions have it, so that it repeats in memory."""
    while kept.ndim and kept.shape[0] == 1:
        kept = kept[0]
    full = np.broadcast_to(kept, shape[len(shape) - kept.ndim :])
    return full if full.ndim else np.ones(1, bool)


def lower(graph: Lowering, node: onnx.NodeProto, defined: Softmax) -> None:
    """A node that bears this definition."""
    (x, *keep), target = graph.defined_inputs(node), graph.declare(node.output[0])
    requantization = graph.requantization(-FINE, target)
    for mask in keep:
        _require_repeated(node, x.shape, mask.shape)
    names = tuple(tensor.name for tensor in (x, *keep))
    table = defined.table(x.encoding)
    graph.steps.append(SoftmaxStep(node.name or target.name, names, target.name, defined, table, requantization))


def _require_repeated(node: onnx.NodeProto, shape: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raises UnsupportedModelError unless a computed mask repeats in memory as the scores are passed through."""
    own = list(mask)
    while own and own[0] == 1:
        own.pop(0)
    if len(mask) != len(shape) or tuple(own) != shape[len(shape) - len(own) :]:
        raise UnsupportedModelError(f"{title(node)}: a computed mask of shape {mask} for scores of shape {shape}")


def _half(keep: Tensor) -> int:
    """The largest code of a mask that takes a value out: real values are kept above 0.5."""
    return keep.zero + math.floor(math.ldexp(0.5, -keep.exponent))
