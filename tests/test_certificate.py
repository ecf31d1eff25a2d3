"""The certificate: bounds that are reached and never exceeded, and proofs that onnxruntime's kernels keep."""

import itertools
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pow2quant.adapters.onnx_qdq import to_qdq
from pow2quant.integer.certificate import certify
from pow2quant.integer.lattice import Lattice, NotProvedError
from pow2quant.pow2_constraints import Encoding, divide_round, requantize, saturate, shift_round
from pow2quant.validation.ort import optimized, plain
from tests.quantized_graphs import Graph, encoding, residual_network

EXACT = 2**24


def only(artifact):
    """The bound of an artifact's only computing node."""
    (bound,) = certify(artifact).layers
    return bound


KINDS = ["Conv", "Conv1d", "ConvTranspose", "Gemm", "Gemm transposed", "MatMul", "MatMul left"]


@st.composite
def layers(draw, op):
    """Small layers of one kind, with random widths, zero points, exponents and attributes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits, x_bits = draw(st.sampled_from([2, 4, 8, 12])), draw(st.sampled_from([4, 8, 12, 16]))
    signed = draw(st.booleans())
    low = -(2 ** (x_bits - 1)) if signed else 0
    x = encoding(draw(st.integers(-12, 4)), draw(st.integers(low, low + 2**x_bits - 1)), x_bits, signed)
    groups = draw(st.sampled_from([1, 2])) if op.startswith("Conv") else 1
    into, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))[: 1 if op == "Conv1d" else 2]
    attributes = {}
    if op.startswith("Conv"):
        attributes = {"group": groups, "pads": [draw(st.integers(0, 1))] * 2 * len(kernel)}
        attributes["strides"] = draw(st.lists(st.integers(1, 3), min_size=len(kernel), max_size=len(kernel)))
        attributes["dilations"] = draw(st.lists(st.integers(1, 2), min_size=len(kernel), max_size=len(kernel)))
    shape, axis, scales, inside = {
        "Conv": ((out, into // groups, *kernel), 0, out, (into, 7, 7)),
        "Conv1d": ((out, into // groups, *kernel), 0, out, (into, 9)),
        "ConvTranspose": ((into, out // groups, *kernel), 1, out // groups, (into, 6, 6)),
        "Gemm": ((out, into + 3), 0, out, (into + 3,)),
        "Gemm transposed": ((into + 3, out), 1, out, (into + 3,)),
        "MatMul": ((into + 3, out), 1, out, (2, into + 3)),
        "MatMul left": ((out, into + 3), 0, out, (into + 3, 2)),
    }[op]
    weight = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    spread = draw(st.integers(0, 3))
    k = rng.integers(-spread, spread + 1, scales) if draw(st.booleans()) else draw(st.integers(-8, 4))
    biased = "MatMul" not in op and draw(st.booleans())
    bias = rng.integers(-(2 ** draw(st.integers(1, 20))), 2**16, out) if biased else None
    g = Graph()
    name = g.input("x", inside, x)
    if op == "Gemm":
        attributes["transB"] = 1
    kind = "Conv" if op == "Conv1d" else op.split()[0]
    g.layer(kind, "layer", name, weight, bias, encoding(0, 0, 16, True), k=k, bits=bits, axis=axis, **attributes)
    if op == "MatMul left":
        g.nodes[-1].input[:] = reversed(g.nodes[-1].input)
    channel = {"MatMul": 2, "MatMul left": 1}.get(op, 1)
    return g.artifact("layer.output"), inside, channel


def affine(artifact, inside, channel):
    """A layer's integers, read off its own float network: A (out, in), b (out,), channel (out,), exponent (out,)."""
    x, weight = artifact.encodings["x"], artifact.encodings["layer.weight"]
    size = int(np.prod(inside))
    basis = np.concatenate([np.zeros((1, size)), np.eye(size)]) * float(x.scale)
    (result,) = plain(artifact.model).run([basis.reshape(-1, *inside).astype(np.float32)])
    channels = np.indices(result.shape[1:])[channel - 1].reshape(-1)
    k_w = np.atleast_1d(weight.exponent)
    k = x.exponent + k_w[channels % len(k_w)]
    integers = np.rint(np.ldexp(result.reshape(size + 1, -1).astype(np.float64), -k)).astype(np.int64)
    return (integers[1:] - integers[0]).T, integers[0], channels, k


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=40)
def test_a_layers_bound_is_reached_and_never_exceeded_and_a_proof_holds_in_every_executor(kind, data):
    layer = artifact, inside, _ = data.draw(layers(kind))
    bound = only(artifact)
    a, b, channels, k = affine(*layer)
    x = artifact.encodings["x"]
    low, high = (int(q - x.zero_point) for q in (x.grid.qmin, x.grid.qmax))

    upmost, lowest = np.maximum(a * high, a * low).sum(1), np.minimum(a * high, a * low).sum(1)
    reached = np.maximum(upmost + np.maximum(b, 0), -(lowest + np.minimum(b, 0)))
    assert bound.per_channel == tuple(reached[channels == c].max() for c in range(channels.max() + 1))
    simple = np.abs(a).sum(1) * max(high, -low) + np.abs(b)
    assert bound.accumulator_max == max(bound.per_channel) <= simple.max()
    assert bound.accumulator_max.bit_length() == bound.bits - 1
    largest = np.ldexp(float(bound.accumulator_max), int(k.max()))  # in units of the result, before it saturates
    assert bound.proved == (bound.accumulator_max <= EXACT and largest < 2**31)
    assert (np.broadcast_to(bound.shift, len(bound.per_channel))[channels] == -k).all()

    if bound.proved:
        worst = [np.where(row > 0, *ends) for row in a[np.argsort(reached)[-3:]] for ends in ((high, low), (low, high))]
        rng = np.random.default_rng(0)
        codes = np.concatenate([worst, rng.integers(low, high + 1, (8, a.shape[1]))])
        exact = requantize(codes @ a.T + b, -k, 0, -(2**15), 2**15 - 1)
        model = to_qdq(artifact)
        for executor in (plain(model), optimized(model)):
            (result,) = executor.run([(codes * x.scale).astype(np.float32).reshape(-1, *inside)])
            np.testing.assert_array_equal(result.reshape(exact.shape), exact)


def linear(bits=8, x_bits=8, n=64, weight=127, bias=0):
    g = Graph()
    x = g.input("x", (n,), encoding(0, 0, x_bits))
    g.layer("Gemm", "fc", x, np.full((1, n), weight), [bias], encoding(8, 0, 16, True), bits=bits, transB=1)
    return g.artifact("fc.output")


def test_sixteen_bit_activations_are_not_proved_and_float32_really_loses_their_sum():
    artifact = linear(x_bits=16)
    assert not only(artifact).proved
    assert only(artifact).accumulator_max == 127 * 64 * 65535
    assert "may reach 532,668,480; float32 is exact to 2^24 = 16,777,216" in only(artifact).reason
    x = np.random.default_rng(0).integers(65000, 65536, (200, 64))
    (result,) = plain(artifact.model).run([x.astype(np.float32)])
    assert (result[:, 0].astype(np.int64) != 127 * x.sum(1)).any()


@pytest.mark.parametrize(("bias", "proved"), [(2**24 - 127 * 255 * 64, True), (2**24 - 127 * 255 * 64 + 1, False)])
def test_two_to_the_24_is_still_proved(bias, proved):
    assert only(linear(bias=bias)).proved is proved
    assert only(linear(bias=-bias)).proved is True  # a negative bias never adds to a positive sum


def test_int32_can_overflow():
    certificate = certify(linear(bits=16, x_bits=16, weight=2**15 - 1))
    assert not certificate.layers[0].int32_safe
    assert certificate.sentence == (
        "0 of 1 layers proved exact in float32; "
        "1 more between the simulation in float64, the integer engine and C; "
        "largest accumulator 38 bits (fc); int32 may overflow in fc"
    )


FREE = Encoding(np.float32(0.3), np.int64(0), encoding(0).grid)


def change_the_unit_of_the_bias(a):
    a.encodings["fc.bias"] = encoding(-1, 0, 32, True)


def move_the_weight_off_its_grid(a):
    weight = a.model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full((1, 64), 0.5, np.float32), weight.name))


def scale_by_alpha(a):
    a.model.graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", 0.5))


def compute_the_weight(a):
    a.model.graph.node.insert(0, onnx.helper.make_node("Neg", ["fc.weight"], ["negative"], name="negate"))
    a.model.graph.node[1].input[1] = "negative"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.encodings.pop("fc.bias"), "bias fc.bias has no encoding: it stays float"),
        (lambda a: a.encodings.pop("fc.weight"), "weight fc.weight has no encoding"),
        (lambda a: a.encodings.pop("x"), "input x has no encoding"),
        (lambda a: a.encodings.update({"x": FREE}), "x: scale 0.3"),
        (lambda a: a.encodings.update({"fc.output": FREE}), "fc.output: scale 0.300000012 is not a power of two"),
        (change_the_unit_of_the_bias, "bias fc.bias does not count in units of s_in * s_w"),
        (move_the_weight_off_its_grid, "fc.weight does not lie on its grid"),
        (scale_by_alpha, "alpha = 0.5 is outside the proof"),
        (compute_the_weight, "weight negative is computed, not constant"),
    ],
)
def test_what_keeps_a_layer_from_being_proved_is_named(change, reason):
    artifact = linear()
    assert only(artifact).proved
    change(artifact)
    bound = certify(artifact).layers[-1]
    assert not bound.proved
    assert reason in bound.reason


def test_units_beyond_float32_are_not_proved():
    g = Graph()
    g.layer("Gemm", "fc", g.input("x", (4,), encoding(-64)), np.ones((1, 4), int), None, encoding(0), k=-64, transB=1)
    assert "units of 2^-128" in only(g.artifact("fc.output")).reason


def single(op, x, y, shape, constants=(), **attributes):
    g = Graph()
    inputs = [g.input("x", shape, x), *(g.constant(f"c{i}", c) for i, c in enumerate(constants))]
    return g.artifact(g.node(op, "node", inputs, y, **attributes))


GRIDS = st.tuples(st.integers(-6, 6), st.integers(0, 255))


@given(st.sampled_from(["Add", "Sub", "Mul"]), GRIDS, GRIDS, GRIDS)
@example("Add", (-4, 3), (-5, 7), (-3, 128))
@example("Add", (0, 200), (-17, 200), (0, 200))
@example("Mul", (6, 0), (6, 255), (-20, 128))
@example("Mul", (-10, 0), (-10, 0), (0, 254))
@settings(max_examples=40)
def test_every_pair_of_codes_agrees_where_an_elementwise_operation_is_proved(op, a, b, y):
    g = Graph()
    inputs = [g.input("a", (65536,), encoding(*a)), g.input("b", (65536,), encoding(*b))]
    artifact = g.artifact(g.node(op, "node", inputs, encoding(*y)))
    p, q = np.repeat(np.arange(256), 256) - a[1], np.tile(np.arange(256), 256) - b[1]
    k = min(a[0], b[0])
    p_aligned, q_aligned = p << (a[0] - k), q << (b[0] - k)
    exact = {"Add": p_aligned + q_aligned, "Sub": p_aligned - q_aligned, "Mul": p * q}[op]
    k = a[0] + b[0] if op == "Mul" else k
    bound = only(artifact)
    assert bound.accumulator_max == np.abs(exact).max()
    assert bound.shift == y[0] - k
    assert not (bound.proved and y[1] % 2 and op != "Sub")
    if bound.proved:
        expected = saturate(shift_round(exact, y[0] - k) + y[1], 0, 255) - y[1]
        reals = [np.ldexp(np.float32(codes[None]), np.int32(grid[0])) for codes, grid in ((p, a), (q, b))]
        for executor in (plain(to_qdq(artifact)), optimized(to_qdq(artifact))):
            (result,) = executor.run(reals)
            np.testing.assert_array_equal(np.ldexp(result[0], -y[0]), expected)


def test_elementwise_operations_of_neighbouring_scales_with_even_zero_points_are_proved():
    for op, k_a, k_b in itertools.product(["Add", "Sub", "Mul"], range(-3, 4), range(-3, 4)):
        g = Graph()
        inputs = [g.input("a", (4,), encoding(k_a, 128)), g.input("b", (4,), encoding(k_b, 31))]
        assert only(g.artifact(g.node(op, "node", inputs, encoding(0, 128)))).proved


def every_sum(n):
    """All sums of n codes of 8 bits, and codes (sums, n) that have them."""
    sums = np.arange(255 * n + 1)
    return sums, sums[:, None] // n + (np.arange(n) < (sums % n)[:, None])


def average(op, x, y, shape):
    if op == "ReduceMean":
        return single(op, x, y, (1, *shape), [np.array([2, 3])], keepdims=1)
    return single(op, x, y, (1, *shape), **({"kernel_shape": list(shape)} if op == "AveragePool" else {}))


AVERAGES = st.sampled_from(["AveragePool", "GlobalAveragePool", "ReduceMean"])
ZERO_POINTS = st.integers(0, 255)


@given(AVERAGES, st.integers(1, 80), st.integers(-3, 3), st.integers(-8, 8), ZERO_POINTS, ZERO_POINTS)
@example("GlobalAveragePool", 49, 0, -5, 0, 0)
@example("AveragePool", 49, 1, -5, 0, 2)
@example("GlobalAveragePool", 64, 2, -5, 4, 2)
@example("AveragePool", 56, 0, -5, 0, 0)
@settings(max_examples=30)
def test_every_sum_is_averaged_alike_where_an_average_is_proved(op, n, drop, k, z_x, z_y):
    artifact = average(op, encoding(k, z_x), encoding(k + drop, z_y), (1, n))
    bound = only(artifact)
    sums, codes = every_sum(n)
    assert bound.accumulator_max == n * max(z_x, 255 - z_x)
    assert bound.shift == drop
    if bound.proved:
        exact = saturate(divide_round((sums - n * z_x) * 2 ** max(0, -drop), n * 2 ** max(0, drop)) + z_y, 0, 255)
        inputs = [np.ldexp(np.float32(codes - z_x), np.int32(k)).reshape(-1, 1, 1, n)]
        for executor in (plain(to_qdq(artifact)), optimized(to_qdq(artifact))):
            (result,) = executor.run(inputs)
            np.testing.assert_array_equal(np.ldexp(result.reshape(-1), -k - drop) + z_y, exact)


def test_an_average_whose_ties_a_reciprocal_misses_is_not_proved_and_onnxruntime_misses_them():
    artifact = average("GlobalAveragePool", encoding(-5), encoding(-4, 2), (1, 7))
    assert only(artifact).reason == ("39 exact ties round differently where 1/7 is multiplied instead of divided by 7")
    _, codes = every_sum(7)
    inputs = [(codes / 32).astype(np.float32).reshape(-1, 1, 1, 7)]
    one, other = (make(to_qdq(artifact)).run(inputs)[0] for make in (plain, optimized))
    assert (one != other).sum() == 39


@pytest.mark.parametrize(("kernel", "drop", "proved"), [((2, 2), 3, True), ((3, 3), 1, True), ((7, 1), 1, False)])
def test_padded_averages_divide_by_every_count_of_their_window(kernel, drop, proved):
    pads = [k // 2 for k in kernel] * 2
    pool = {"kernel_shape": list(kernel), "pads": pads, "strides": [1, 1]}
    bound = only(single("AveragePool", encoding(-5), encoding(-5 + drop), (1, 9, 9), **pool))
    assert bound.proved is proved
    if proved:
        x = np.random.default_rng(0).integers(0, 256, (50, 1, 9, 9)).astype(np.float32) / 32
        model = to_qdq(single("AveragePool", encoding(-5), encoding(-5 + drop), (1, 9, 9), **pool))
        np.testing.assert_array_equal(plain(model).run([x])[0], optimized(model).run([x])[0])


def test_wide_codes_are_too_fine_for_quotients_and_free_shapes_are_unknown():
    wide = average("GlobalAveragePool", encoding(-5, 0, 16), encoding(-5, 0, 16), (7, 7))
    assert "quotients by 49 on 16 bits are too fine for float32" in only(wide).reason
    free = average("GlobalAveragePool", encoding(-5), encoding(-5), ("height", 7))
    assert "how many values of x are averaged is not known" in only(free).reason
    assert "a quotient by 49 stays float" in only(average("GlobalAveragePool", encoding(-5), None, (7, 7))).reason


@pytest.mark.parametrize(
    ("op", "constants", "attributes", "reason"),
    [
        ("HardSwish", [], {}, "function table: executors compute HardSwish in float32"),
        ("Sigmoid", [], {}, "function table"),
        ("Softmax", [], {"axis": -1}, "sums and quotients of Softmax"),
        ("LayerNormalization", [np.ones(6, np.float32)], {}, "sums and quotients of LayerNormalization"),
        ("CumSum", [np.array(1)], {}, "sums and quotients of CumSum in float32"),
        ("Mul", [np.float32(0.1)], {}, "the product"),
        ("Add", [np.float32(0.1)], {}, "the sum"),
    ],
)
def test_functions_and_free_constants_are_not_proved(op, constants, attributes, reason):
    assert reason in only(single(op, encoding(0), encoding(0), (6,), constants, **attributes)).reason


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_only_the_nearest_resize_is_exact(mode):
    sizes = [np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)]
    artifact = single("Resize", encoding(0), encoding(0), (1, 4, 4), sizes, mode=mode)
    assert certify(artifact).proved is (mode == "nearest")


def test_values_are_followed_through_tensors_without_encoding():
    g = Graph()
    x = g.input("x", (2, 4, 4), encoding(-4, 128))
    y = g.layer("Conv", "conv", x, np.full((2, 2, 1, 1), 3), k=[-3, -5])
    y = g.node("Relu", "relu", [y])
    y = g.node("Mul", "mul", [y, g.constant("factor", np.array([[[5]], [[7]]]), encoding(-1, 0, 8, True))])
    y = g.node("Add", "add", [y, g.constant("offset", np.array([[[1.5]], [[-0.25]]], np.float32))])
    y = g.node("Pad", "pad", [y, g.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))])
    y = g.node("GlobalMaxPool", "pool", [y], encoding(-6, 100))
    certificate = certify(g.artifact(y))
    conv, mul, add = certificate.layers
    assert certificate.proved
    assert conv.per_channel == (6 * 128, 6 * 128)
    assert mul.per_channel == (5 * 768, 7 * 768)
    # 1.5 is 384 * 2^-8 on the side of 127, -0.25 is -256 * 2^-10 on the side of -128
    assert add.per_channel == (5 * 6 * 127 + 384, 7 * 768 + 256)
    assert (conv.shift, add.shift) == (None, None)


def test_a_product_of_activations_sums_over_the_common_dimension():
    g = Graph()
    a, b = g.input("a", (3, 10), encoding(-2, 128)), g.input("b", (10, 5), encoding(-3, 0, 8, True))
    bound = only(g.artifact(g.node("MatMul", "scores", [a, b], encoding(0, 128))))
    assert (bound.accumulator_max, bound.proved, bound.shift) == (10 * 128 * 128, True, 5)


def test_a_whole_network_is_proved_and_says_so():
    certificate = certify(residual_network())
    assert certificate.proved
    assert certificate.unproved == ()
    names = ["stem", "depthwise", "project", "residual", "average", "global", "fc"]
    assert [layer.node for layer in certificate.layers] == names
    assert certificate.sentence == (
        "4 of 4 layers proved exact in float32, 3 of 3 other operations; largest accumulator 20 bits (stem); "
        "int32 cannot overflow"
    )
    document = json.loads(json.dumps(certificate.to_json()))
    assert document["sentence"] == certificate.sentence
    assert [layer["shift"] for layer in document["layers"]][2:4] == [5, 3]


def test_nothing_is_said_of_accumulators_that_are_not_known():
    bounds = [replace(layer, accumulator_max=None) for layer in certify(residual_network()).layers]
    none, some = replace(certify(residual_network()), layers=tuple(bounds)), certify(residual_network())
    assert "overflow" not in none.sentence
    some = replace(some, layers=(bounds[0], *some.layers[1:]))
    assert "int32 cannot overflow in the others; no integers on the 2^k grid in stem" in some.sentence


def test_odd_zero_points_behind_sums_and_averages_are_not_proved():
    certificate = certify(residual_network(add_zero_point=1))
    assert not certificate.proved
    assert certificate.unproved == ("residual", "average")
    assert "odd zero point 101" in certificate.layers[3].reason


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_a_constants_lattice_holds_it_and_is_the_coarsest(values):
    constants = np.array(values, np.float32)
    lattice = Lattice.of_constants(constants)
    np.testing.assert_array_equal(np.ldexp(lattice.low + lattice.high, lattice.exponent), constants)
    assert (((lattice.low + lattice.high) % 2 == 1) | (constants == 0)).all()


def test_a_constant_that_is_not_finite_has_no_lattice():
    with pytest.raises(NotProvedError, match="not finite"):
        Lattice.of_constants(np.array([1, np.inf]))


def test_constants_may_be_nodes_and_axes_may_not_be_computed():
    g = Graph()
    x = g.input("x", (2, 3, 3), encoding(-4, 128))
    bounds = [onnx.numpy_helper.from_array(np.float32(bound)) for bound in (0, 6)]
    g.nodes += [onnx.helper.make_node("Constant", [], [f"bound{i}"], value=bound) for i, bound in enumerate(bounds)]
    y = g.node("Clip", "clip", [x, "bound0", "bound1"])
    artifact = g.artifact(g.node("Add", "add", [y, x], encoding(-3)))
    assert only(artifact).accumulator_max == 2 * 128
    g.nodes.append(onnx.helper.make_node("Shape", ["x"], ["axes"], start=1, end=2))
    g.node("ReduceMean", "mean", ["x", "axes"], encoding(-4), keepdims=0)
    bounds = certify(g.artifact("add.output")).layers
    assert bounds[-1].reason == "axes is computed, not constant"


def test_a_sum_that_loses_bits_to_the_output_zero_point_is_not_proved_and_onnxruntime_loses_them():
    g = Graph()
    inputs = [g.input("a", (65536,), encoding(16)), g.input("b", (65536,), encoding(0))]
    artifact = g.artifact(g.node("Add", "node", inputs, encoding(17, 100)))
    assert only(artifact).accumulator_max == 255 * 2**16 + 255 < EXACT
    assert "with operands and zero points in one unit" in only(artifact).reason
    a, b = np.repeat(np.arange(256), 256), np.tile(np.arange(256), 256)
    batch = [np.float32(a[None] * 2**16), np.float32(b[None])]
    one, other = (make(to_qdq(artifact)).run(batch)[0] for make in (plain, optimized))
    assert (one != other).any()


def test_zero_points_count_in_the_units_of_products_and_averages():
    g = Graph()
    inputs = [g.input("a", (4,), encoding(0)), g.input("b", (4,), encoding(0))]
    product = only(g.artifact(g.node("Mul", "node", inputs, encoding(17, 128))))
    assert "the product, with the zero point in its unit" in product.reason
    mean = only(average("AveragePool", encoding(0), encoding(3, 120), (128, 256)))
    assert "the average, with the zero point in its unit" in mean.reason
    assert only(average("AveragePool", encoding(0), encoding(3), (128, 256))).proved
