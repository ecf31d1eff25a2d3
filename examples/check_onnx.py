"""A QDQ file that another tool wrote: which scales are no powers of two, and does onnxruntime agree with itself?

python examples/check_onnx.py [FILE.onnx]    (without a file, onnxruntime's own quantizer makes one)
"""

import sys
import tempfile
from math import log2
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from pow2quant import validate


class Noise(CalibrationDataReader):
    def __init__(self, rng):
        self.batches = iter([{"x": rng.random((8, 3, 16, 16), np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self.batches, None)


def quantized_by_onnxruntime(folder: Path) -> Path:
    """A convolution with a ReLU and a linear layer, quantized with free scales as `quantize_static` does."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8 * 14 * 14, 10), "b2": (10,)}
    weights = [numpy_helper.from_array(rng.normal(0, 0.2, s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Flatten", ["relu"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w2", "b2"], ["logits"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 16, 16])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "float.onnx")
    target = folder / "qdq.onnx"
    quantize_static(folder / "float.onnx", target, Noise(rng), QuantFormat.QDQ, weight_type=QuantType.QInt8)
    return target


with tempfile.TemporaryDirectory() as folder:
    found = validate(Path(sys.argv[1]) if len(sys.argv) > 1 else quantized_by_onnxruntime(Path(folder)))
for tensor, scale in found.free_scales:
    print(f"{tensor}: scale {scale:.6g} = 2^{log2(scale):.3f}")
print(f"{len(found.free_scales)} free scales")
for a in found.agreements:
    print(f"{a.executor} against {a.against}: {a.differing} of {a.elements} elements differ: {a.claim}")
print(found.certificate_sentence)
