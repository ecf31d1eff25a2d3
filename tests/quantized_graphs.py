"""Quantized networks as the backends hand them over, built node by node."""

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pow2quant.artifact import Artifact
from pow2quant.pow2_constraints import Encoding, IntGrid


def encoding(k, z=0, bits=8, signed=False, axis=None):
    """2^k on a grid; k may be a sequence, one per channel."""
    scale = np.ldexp(np.float32(1), np.asarray(k, np.int32))
    return Encoding(scale, np.broadcast_to(z, scale.shape), IntGrid(bits, signed), axis)


class Graph:
    """Collects nodes and encodings; a node called `a` has the result `a.output`."""

    def __init__(self):
        self.nodes, self.initializers, self.inputs, self.encodings = [], [], [], {}

    def input(self, name, shape, grid):
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]))
        return self._encoded(name, grid)

    def constant(self, name, values, grid=None):
        """Integers q - z when there is a grid, real values otherwise."""
        real = np.asarray(values) if grid is None else np.asarray(values) * grid.along(grid.scale, np.shape(values))
        real = real if grid is None else real.astype(np.float32)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(real).reshape(real.shape), name))
        return self._encoded(name, grid)

    def node(self, op, name, inputs, grid=None, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [f"{name}.output"], name=name, **attributes))
        return self._encoded(f"{name}.output", grid)

    def layer(self, op, name, x, weight, bias=None, grid=None, *, k=0, bits=8, axis=0, **attributes):
        """A weighted node; weight and bias are integers, k is the weight's exponent or one per channel."""
        per_channel = np.ndim(k) > 0
        weights = encoding(k, 0, bits, True, axis if per_channel else None)
        inputs = [x, self.constant(f"{name}.weight", weight, weights)]
        if bias is not None:
            exponents = weights.exponent + self.encodings[x].exponent
            if per_channel and len(bias) > len(k):  # groups of a transposed convolution share their scales
                exponents = np.tile(exponents, len(bias) // len(k))
            units = encoding(exponents, 0, 32, True, 0 if per_channel else None)
            inputs.append(self.constant(f"{name}.bias", bias, units))
        return self.node(op, name, inputs, grid, **attributes)

    def artifact(self, *outputs):
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, results, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model)
        del model.graph.value_info[:]
        onnx.checker.check_model(model, full_check=True)
        return Artifact(model, self.encodings)

    def _encoded(self, name, grid):
        if grid is not None:
            self.encodings[name] = grid
        return name


def residual_network(add_zero_point=0, seed=0):
    """A small network with convolutions (one depthwise), pools, a residual sum, a concatenation and a linear layer.

    Nothing in it saturates most of the time or is nearly constant, so that differences show up at its end.
    """
    rng = np.random.default_rng(seed)

    def integers(*shape, bits=8):
        return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)

    g = Graph()
    x = g.input("x", (3, 12, 12), encoding(-6, 128))
    k = list(rng.integers(-10, -8, 8))
    g.layer("Conv", "stem", x, integers(8, 3, 3, 3), rng.integers(-9000, 9000, 8), k=k, pads=[1] * 4)
    a = g.node("Relu", "stem_relu", ["stem.output"], encoding(-6))
    a = g.node("MaxPool", "pool", [a], encoding(-6), kernel_shape=[2, 2], strides=[2, 2])
    six = [g.constant("relu6.min", np.float32(0)), g.constant("relu6.max", np.float32(6))]
    weight, bias = integers(8, 1, 3, 3), rng.integers(-9000, 9000, 8)
    g.layer("Conv", "depthwise", a, weight, bias, k=list(rng.integers(-8, -6, 8)), group=8, pads=[1] * 4)
    b = g.node("Clip", "relu6", ["depthwise.output", *six], encoding(-5))
    weight, bias = integers(8, 8, 1, 1, bits=4), rng.integers(-200, 200, 8)
    b = g.layer("Conv", "project", b, weight, bias, encoding(-4, 128), k=[-4] * 8, bits=4)
    c = g.node("Add", "residual", [a, b], encoding(-3, 100 + add_zero_point))
    d = g.node("AveragePool", "average", [c], encoding(-4, 100 + add_zero_point), kernel_shape=[2, 2], strides=[2, 2])
    e = g.node("MaxPool", "maximum", [c], encoding(-3, 100 + add_zero_point), kernel_shape=[2, 2], strides=[2, 2])
    f = g.node("Concat", "concat", [d, e], encoding(-3, 100), axis=1)
    h = g.node("GlobalAveragePool", "global", [f], encoding(-5, 100))
    h = g.node("Flatten", "flatten", [h], encoding(-5, 100))
    weight, bias = integers(10, 16), rng.integers(-9000, 9000, 10)
    y = g.layer("Gemm", "fc", h, weight, bias, encoding(-4, 128), k=list(rng.integers(-8, -6, 10)), transB=1)
    return g.artifact(y)


def ternary(rng, shape, negative=0, positive=0):
    """Random integers of -2^negative, 0 and 2^positive, each a number or one per output channel; all three occur."""
    codes = rng.integers(-1, 2, shape)
    codes.reshape(-1)[:3] = -1, 0, 1
    low, high = (np.broadcast_to(s, shape[0]).reshape(-1, *[1] * (len(shape) - 1)) for s in (negative, positive))
    return np.where(codes > 0, 1 << high, np.where(codes < 0, -(1 << low), 0))


def ternary_network(bits=8, signed=False, shifted=True, seed=0):
    """Ternary layers of every kind: dense, strided, grouped, depthwise, 1x1 and linear; shifts where `shifted`.

    bits, signed: of the activations.
    """
    rng = np.random.default_rng(seed)

    def weights(*shape):
        negative, positive = rng.integers(0, 3, (2, shape[0])) * shifted
        return ternary(rng, shape, negative, positive)

    def grid(k):
        return encoding(k + 8 - bits, 0 if signed else 2 ** (bits - 1) - 2, bits, signed)

    width = 4 if shifted else 2
    g = Graph()
    x = g.input("x", (6, 9, 17), grid(-4))
    x = g.layer("Conv", "wide", x, weights(6, 6, 3, 3), rng.integers(-99, 99, 6), grid(0), k=[-3, -2, -4, -3, -5, -1],
                bits=width, pads=[1] * 4)  # fmt: skip
    x = g.layer("Conv", "depthwise", x, weights(6, 1, 3, 2), rng.integers(-99, 99, 6), grid(1), k=[-1] * 6, bits=width,
                group=6, pads=[1, 0, 1, 1])  # fmt: skip
    x = g.layer("Conv", "grouped", x, weights(8, 3, 3, 3), rng.integers(-99, 99, 8), grid(2), k=[-1] * 8, bits=width,
                group=2, strides=[2, 2], pads=[1] * 4)  # fmt: skip
    x = g.layer("Conv", "pointwise", x, weights(33, 8, 1, 1), None, grid(2), k=-1, bits=width)
    x = g.layer("Conv", "long", x, weights(7, 33, 3, 3), None, grid(3), k=-1, bits=width)
    x = g.node("GlobalAveragePool", "mean", [x], grid(1))
    x = g.node("Flatten", "flat", [x], grid(1))
    y = g.layer("Gemm", "fc", x, weights(5, 7), rng.integers(-9, 9, 5), grid(1), k=[-1] * 5, bits=width, transB=1)
    return g.artifact(y)


class _Grower:
    """Grows a random network, node by node, on grids that its values neither saturate nor leave empty."""

    def __init__(self, seed, bits):
        self.rng, self.g, self.bits, self.count = np.random.default_rng(seed), Graph(), bits, 0
        shape = (int(self.rng.integers(1, 5)), *map(int, self.rng.integers(5, 9, 2)))
        self.tensors = [(self.g.input("x", shape, self.grid(-5, 0)), shape)]

    def grid(self, k, drift=1):
        """Near 2^k for 8 bits; signed, with an even zero point, or unsigned from zero."""
        k = int(k) + int(self.rng.integers(-drift, drift + 1)) + 8 - self.bits
        signed, z = bool(self.rng.integers(2)), int(self.rng.integers(0, 2 ** (self.bits - 1))) // 2 * 2
        return encoding(k, 0 if signed else z, self.bits, signed)

    def grow(self, kind):
        x, shape = self.tensors[-1]
        name, k = f"n{self.count}", int(self.g.encodings[x].exponent) - 8 + self.bits
        self.count += 1
        result = getattr(self, f"_{kind}")(name, x, shape, k)
        if result is not None:
            self.tensors.append(result)

    def _conv(self, name, x, shape, k, depthwise=False):
        c = shape[0]
        out = c if depthwise else int(self.rng.integers(1, 6))
        size, pads = self.rng.integers(1, 4, 2), [int(p) for p in self.rng.integers(0, 2, 4)]
        height, width = (
            n + pads[i] + pads[2 + i] - s + 1 for i, (n, s) in enumerate(zip(shape[1:], size, strict=True))
        )
        if min(height, width) < 2:
            return None
        weights = self.rng.integers(-128, 128, (out, 1 if depthwise else c, *size))
        exponents = self.rng.integers(-8, -6, out)
        if self.rng.integers(3) == 0:
            weights = 16 * ternary(self.rng, (*weights.shape, 3), *self.rng.integers(0, 3, (2, out)))[..., 0]
        bias = self.rng.integers(-(2**11), 2**11, out)
        spread = np.log2(64 * np.sqrt(weights[0].size)) - 7
        args = {"k": exponents, "pads": pads, "group": c if depthwise else 1}
        relu = self.rng.integers(2)
        y = self.g.layer("Conv", name, x, weights, bias, None if relu else self.grid(k + spread), **args)
        if relu:
            y = self.g.node("Relu", f"{name}r", [y], encoding(k + int(spread), 0, self.bits))
        return y, (out, height, width)

    def _depthwise(self, name, x, shape, k):
        return self._conv(name, x, shape, k, depthwise=True)

    def _add(self, name, x, shape, k):
        others = [t for t, s in self.tensors if s == shape]
        other = others[self.rng.integers(len(others))]
        return self.g.node("Add", name, [x, other], self.grid(k + 1)), shape

    def _mul(self, name, x, shape, k):
        others = [t for t, s in self.tensors if s == shape]
        other = others[self.rng.integers(len(others))]
        return self.g.node("Mul", name, [x, other], self.grid(k + 2)), shape

    def _concat(self, name, x, shape, k):
        others = [(t, s) for t, s in self.tensors if s[1:] == shape[1:]]
        other, s = others[self.rng.integers(len(others))]
        return self.g.node("Concat", name, [x, other], self.grid(k), axis=1), (shape[0] + s[0], *shape[1:])

    def _maxpool(self, name, x, shape, k):
        if min(shape[1:]) < 4:
            return None
        y = self.g.node("MaxPool", name, [x], self.g.encodings[x], kernel_shape=[2, 2], strides=[2, 2])
        return y, (shape[0], shape[1] // 2, shape[2] // 2)

    def _average(self, name, x, shape, k):
        if min(shape[1:]) < 4:
            return None
        y = self.g.node("AveragePool", name, [x], self.grid(k), kernel_shape=[2, 2], strides=[1, 1])
        return y, (shape[0], shape[1] - 1, shape[2] - 1)

    def _transpose(self, name, x, shape, k):
        y = self.g.node("Transpose", name, [x], self.g.encodings[x], perm=[0, 1, 3, 2])
        return y, (shape[0], shape[2], shape[1])

    def finish(self):
        x, shape = self.tensors[-1]
        k = int(self.g.encodings[x].exponent)
        x = self.g.node("Flatten", "flat", [x], self.g.encodings[x])
        weights = self.rng.integers(-128, 128, (3, int(np.prod(shape))))
        spread = int(np.log2(64 * np.sqrt(weights[0].size)))
        y = self.g.layer(
            "Gemm", "fc", x, weights, self.rng.integers(-999, 999, 3), self.grid(k - 8 + spread), k=[-8] * 3, transB=1
        )
        return self.g.artifact(y)


KINDS = ("conv", "depthwise", "add", "mul", "concat", "maxpool", "average", "transpose")


@st.composite
def networks(draw, largest=6):
    """Random small networks whose scales are powers of two."""
    grower = _Grower(draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([8, 8, 8, 6, 4])))
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=largest)):
        grower.grow(kind)
    return grower.finish()
