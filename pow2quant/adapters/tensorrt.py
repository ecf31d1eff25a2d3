"""ONNX for TensorRT's parser: QDQ with int8 and zero points 0 only, and biases that stay float.

https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from pow2quant.adapters import onnx_qdq
from pow2quant.adapters.onnx_qdq import clips, float_biases
from pow2quant.adapters.onnx_qdq.nodes import title
from pow2quant.errors import UnsupportedModelError

if TYPE_CHECKING:
    from pow2quant.artifact import Artifact

OPERATIONS = """
    Abs Add And ArgMax ArgMin AveragePool Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos
    CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual HardSigmoid Identity
    LeakyRelu Less LessOrEqual Log LogSoftmax LRN MatMul Max MaxPool Mean Min Mul Neg Not Or PRelu Pad Pow
    QuantizeLinear Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize Round Scatter ScatterElements ScatterND Selu Shape Sigmoid Sign
    Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile
    TopK Transpose Unsqueeze Where Xor
"""
"""What the parser's table of operations has had since TensorRT 8.4, without loops and random numbers, by spaces."""


def export_tensorrt(
    artifact: Artifact, folder: str | Path, *, opset: int | None = None, batch: int | None = None
) -> Path:
    """QDQ ONNX as TensorRT's parser takes it, as `model.onnx`; opset, batch: as of `qdq`.

    Raises UnsupportedModelError, naming tensor or node and the rule, where the network does not fit.
    """
    path = Path(folder) / "model.onnx"
    onnx_qdq.save(onnx_qdq.asked(to_tensorrt(artifact), opset, batch), path)
    return path


def to_tensorrt(artifact: Artifact) -> ModelProto:
    """The artifact as a model for TensorRT, which `from_qdq` reads back."""
    model = onnx_qdq.to_qdq(artifact.per_channel())
    clips.restore(model.graph)
    float_biases.put(model, artifact.encodings)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        _check(node, constants)
    return model


def _check(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        zero_point = constants[node.input[2]]
        kind = TensorProto.DataType.Name(zero_point.data_type).lower()
        name = node.name.rpartition("/")[0]
        if kind != "int8":
            raise UnsupportedModelError(f"{name}: codes of type {kind}; TensorRT takes int8 (--target tensorrt)")
        if numpy_helper.to_array(zero_point).any():
            raise UnsupportedModelError(f"{name}: a zero point; TensorRT takes 0 only (--target tensorrt)")
    elif node.domain not in ("", "ai.onnx") or node.op_type not in OPERATIONS.split():
        raise UnsupportedModelError(f"node {title(node)}: TensorRT has no such operation")
    elif node.op_type == "Cast" and node.attribute[0].i == TensorProto.DOUBLE:
        raise UnsupportedModelError(f"{node.input[0]}: is read in double to be exact; TensorRT has float32 only")
