"""What onnxruntime's graph optimizers rewrite, and why no rewrite changes a value of a file that is proved.

`REWRITES` is the list of its transformers for the CPU (names as in onnxruntime 1.31; the table of the documentation is
made from it). Three of them change values: `changed_value` finds what they would change in an artifact's graph, for the
certificate to refuse and for the exporter to write in another way (`adapters/onnx_qdq/guards.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.operators import OPERATIONS, Values, operations

if TYPE_CHECKING:
    import onnx

    from pow2quant.graphs import GraphIndex
    from pow2quant.pow2_constraints import Encoding

    Table = dict[str, Encoding]


@dataclass(frozen=True)
class Rewrite:
    """A graph transformer. level: basic, extended or layout. guard: what it does to a quantized file, and why exact."""

    name: str
    level: str
    guard: str


_MOVES = "move, join or drop nodes that do not compute: the same values"
_FLOAT = "change float nodes only; a node without encodings of its inputs and result is not proved"
_ABSENT = "replace patterns that no proved file contains: the certificate knows none of the operations they make"
_EXACT_SUM = "fold into a layer: there is Q/DQ between two layers, and a layer with a float weight is not proved"

REWRITES: tuple[Rewrite, ...] = (
    Rewrite(
        "DoubleQDQPairsRemover",
        "basic",
        "merges Q-DQ-Q-DQ into one pair with a third scale, which **changes values**. The exporter keeps a node "
        "between the pairs; the certificate refuses two encodings of one storage type if no node between them stays",
    ),
    Rewrite(
        "Pad_Fusion",
        "basic",
        "moves a float Pad into the next pool or convolution; MaxPool then pads with minus infinity, which **changes "
        "values**. The exporter keeps a node between the two; the certificate refuses files without it. Conv and "
        "AveragePool pad with 0",
    ),
    *(
        Rewrite(name, "basic", "drop nodes that do nothing: exact, but Q/DQ pairs may become neighbours (first row)")
        for name in (
            *("EliminateIdentity", "EliminateDropout", "EliminateSlice", "NoopElimination", "ExpandElimination"),
            *("CastElimination", "CastChainElimination", "UnsqueezeElimination", "PreShapeNodeElimination"),
        )
    ),
    *(
        Rewrite(name, "basic", _MOVES)
        for name in (
            *("CommonSubexpressionElimination", "ConstantSharing", "ReshapeFusion", "GatherSliceToSplitFusion"),
            *("GatherToSliceFusion", "SliceConcatToSpaceToDepthFusion", "NotWhereFusion", "LabelEncoderFusion"),
            *("FreeDimensionOverrideTransformer", "GemmTransposeFusion"),
        )
    ),
    Rewrite(
        "TransposeOptimizer",
        "basic",
        "moves and cancels Transpose, so two Q/DQ pairs may become neighbours (first row). It moves a rounding in "
        "front of a Transpose, and a float output of the graph is then rounded too, which **changes values**. The "
        "exporter keeps a node between the output and the Transpose; the certificate refuses files without it",
    ),
    Rewrite("ConstantFolding", "basic", "computes constants with the same kernels"),
    Rewrite("QDQPropagationTransformer", "basic", "repeats an encoding around a node that only moves values"),
    Rewrite(
        "WeightBiasQuantization",
        "basic",
        "quantizes float biases. In files of pow2quant every bias is int32 in units of s_in * s_w, and a layer with a "
        "float bias is not proved",
    ),
    *(
        Rewrite(name, "basic", _EXACT_SUM)
        for name in (
            *("ConvAddFusion", "ConvMulFusion", "ConvBNFusion", "MatmulBNFusion", "MatMul_BatchNormalization_Fusion"),
            *("MatMulAddFusion", "GemmSumFusion", "DivMulFusion"),
        )
    ),
    Rewrite(
        "ClipQuantRewrite",
        "extended",
        "drops a Clip if the next Q saturates at the same bounds: the same codes; before one of 4 bits it is an error, "
        "and the reader refuses that",
    ),
    Rewrite(
        "ReluQuantRewrite",
        "extended",
        "drops a Relu before a Q whose smallest code is zero: the same codes; before one of 4 bits it drops it "
        "whatever the zero point is, and the reader refuses that",
    ),
    Rewrite(
        "QDQSelectorActionTransformer",
        "extended",
        "computes DQ-node-Q on integers: the sums that the certificate bounds, and one rounding. The certificate "
        "refuses odd zero points of Add, Mul and AveragePool, quotients that miss ties, and results beyond int32",
    ),
    Rewrite("QDQFinalCleanupTransformer", "extended", "drops a DQ-Q pair of one encoding: the same codes"),
    Rewrite("QDQS8ToU8Transformer", "extended", "adds 128 to codes and zero point: the same values"),
    Rewrite("Avx2WeightS8ToU8Transformer", "extended", "adds 128 to a weight's codes: the same values"),
    *(
        Rewrite(name, "extended", _FLOAT)
        for name in (
            *("ConvActivationFusion", "GemmActivationFusion", "MatMulActivationFusion", "MatmulTransposeFusion"),
            *("MatMulScaleFusion", "GeluFusionL1", "GeluFusionL2", "FastGeluFusion", "QuickGeluFusion"),
            *("BiasGeluFusion",),
            *("BiasSoftmaxFusion", "BiasDropoutFusion", "LayerNormFusionL1", "LayerNormFusionL2"),
            *("SimplifiedLayerNormFusion",),
            *("SkipLayerNormFusion", "BiasSkipLayerNormFusion", "EmbedLayerNormFusion", "AttentionFusion"),
            *("GroupQueryAttentionFusion", "GroupQueryAttentionPreNormFusion", "GqaValueLayoutTransformer"),
        )
    ),
    *(
        Rewrite(name, "extended", _ABSENT)
        for name in (
            *("MatMulIntegerToFloatFusion", "DynamicQuantizeMatMulFusion", "DQMatMulNBitsFusion"),
            *("MatMulNBitsMlpFusion",),
            *("MatMulNBitsQkvFusion", "FuseFp16InitializerToFp32NodeTransformer", "RemoveDuplicateCastTransformer"),
            *("InsertCastTransformer", "CastFloat16Transformer", "GeluApproximation"),
        )
    ),
    *(
        Rewrite(name, "layout", "use another order in memory: sums within 2^24 are exact in any order")
        for name in ("NchwcTransformer", "NhwcTransformer", "ConvAddActivationFusion")
    ),
    Rewrite("MemcpyTransformer", "layout", "copies between devices; here is only one"),
)  # fmt: skip
"""Every transformer, and what guards a value against it."""

MOVES = (*operations(Values.MOVED, Values.FILLED), "Cast", "Concat")
PROPAGATED = tuple(op for op, row in OPERATIONS.items() if row.propagated)
"""Operations past which QDQPropagationTransformer moves a Q or repeats a DQ."""

NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
"""The constant with which an operation does nothing."""


def changed_value(graph: GraphIndex, table: Table, node: onnx.NodeProto) -> str | None:
    """Why an optimizer of onnxruntime would change this node's result; None where none would."""
    if (name := merged(graph, table, node)) is not None:
        return (
            f"{name} quantizes again, in another encoding, what was quantized before: onnxruntime's "
            "DoubleQDQPairsRemover merges the two into a third"
        )
    pad = padded_pool(graph, table, node)
    if pad is not None:
        return (
            f"{pad.name or pad.output[0]} pads in float: onnxruntime's Pad_Fusion lets MaxPool pad with minus infinity"
        )
    outputs = [name for name in node.output if name in graph.outputs and name not in table]
    given = next((n for n in outputs if any(rounds_output(graph, table, r) for r in graph.readers.get(n, []))), None)
    if given is not None:
        return (
            f"{given} is a float output, and rounded behind a Transpose: onnxruntime's TransposeOptimizer rounds the "
            "output too"
        )
    return None


def merged(graph: GraphIndex, table: Table, node: onnx.NodeProto) -> str | None:
    """The result of this node whose encoding DoubleQDQPairsRemover would merge with one in front."""
    return next((name for name in node.output if name in table and _is_merged(graph, table, node, name)), None)


def rounds_output(graph: GraphIndex, table: Table, node: onnx.NodeProto) -> bool:
    """Whether the TransposeOptimizer would round a float graph output that this node reads."""
    data = moved(graph, node)
    return data in graph.outputs and data not in table and _is_transposed_and_rounded(graph, table, node)


def _is_transposed_and_rounded(graph: GraphIndex, table: Table, node: onnx.NodeProto, transposed: bool = False) -> bool:
    transposed = transposed or node.op_type == "Transpose"
    idle = moved(graph, node) is not None and _vanishes(graph, node)
    if not idle and not (transposed and node.op_type in PROPAGATED):
        return False
    result = node.output[0]
    if result in table:
        return transposed
    readers = graph.readers.get(result, [])
    return any(_is_transposed_and_rounded(graph, table, reader, transposed) for reader in readers)


def padded_pool(graph: GraphIndex, table: Table, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Pad that Pad_Fusion would move into this node, where its zeros would become minus infinity."""
    if node.op_type != "MaxPool":
        return None
    name = node.input[0]
    while name not in table and (source := graph.producers.get(name)) is not None:
        if source.op_type == "Pad":
            return source
        if (data := moved(graph, source)) is None:
            return None
        name = data
    return None


def may_be_rounded_in_front(graph: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether an optimizer may drop this node, or round in front of it what is rounded behind it."""
    return node.op_type in PROPAGATED or (moved(graph, node) is not None and _vanishes(graph, node))


def _is_merged(graph: GraphIndex, table: Table, node: onnx.NodeProto, result: str) -> bool:
    """Whether nothing stays between this encoded result and an encoded tensor of another encoding in front of it."""
    between: list[onnx.NodeProto] = []
    name, current = result, node
    while True:
        between.append(current)
        data = moved(graph, current)
        if data is None or not (len(between) > 1 or _vanishes(graph, current) or data not in table):
            return False
        name = data
        if name in table:
            break
        if name not in graph.producers:
            return False
        current = graph.producers[name]
    first, second = table[name], table[result]
    alike = first.grid.signed == second.grid.signed and (first.grid.width > 8) == (second.grid.width > 8)
    return alike and first != second


def moved(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """The one tensor whose values a node moves on; None where it computes, or joins several."""
    if node.op_type in NEUTRAL:
        return next((data for data, other in _orders(node) if _is_neutral(graph, node, other)), None)
    joins = node.op_type == "Concat" and len(node.input) > 1
    return node.input[0] if node.op_type in MOVES and not joins else None


def _orders(node: onnx.NodeProto) -> list[tuple[str, str]]:
    a, b = node.input
    return [(a, b)] if node.op_type in ("Sub", "Div") else [(a, b), (b, a)]


def _is_neutral(graph: GraphIndex, node: onnx.NodeProto, name: str) -> bool:
    return name in graph.constants and bool((graph.constants[name] == NEUTRAL[node.op_type]).all())


def _vanishes(graph: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether an executor may drop a node that moves values: it does nothing, as far as is known."""
    if node.op_type in (*NEUTRAL, "Identity", "Dropout", "Cast", "Expand", "Transpose"):
        return True  # a Transpose moves through its neighbours until it meets its inverse
    before, after = (graph.shapes.get(name) for name in (node.input[0], node.output[0]))
    pads = graph.constants.get(node.input[1]) if node.op_type == "Pad" and len(node.input) > 1 else None
    return (before is None or after is None or before == after) and not (pads is not None and np.any(pads))
