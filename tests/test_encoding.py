"""Grids and encodings: against exact fractions, ONNX's reference and onnxruntime."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pow2quant.errors import EncodingError, NotPowerOfTwoError
from pow2quant.pow2_constraints import Encoding, IntGrid, power_of_two
from tests import strategies as our

INT8, UINT8 = IntGrid(8, signed=True), IntGrid(8, signed=False)
SHAPE = (3, 2, 4)


def codes(x, encoding):
    """The definition: round(x / scale) + zero point, saturated, in fractions."""
    low, high = int(encoding.grid.qmin), int(encoding.grid.qmax)
    scale, zero_point = Fraction(float(encoding.scale)), int(encoding.zero_point)
    return [min(max(round(Fraction(v) / scale) + zero_point, low), high) for v in x.tolist()]


def channels(encoding, x):
    """(encoding, values) of each channel as scalars and rows."""
    if encoding.axis is None:
        return [(encoding, x.ravel())]
    bits = np.broadcast_to(encoding.grid.bits, encoding.scale.shape)
    grids = [IntGrid(int(b), encoding.grid.signed, encoding.grid.narrow) for b in bits]
    rows = np.moveaxis(x, encoding.axis, 0).reshape(len(bits), -1)
    parts = zip(encoding.scale, encoding.zero_point, grids, strict=True)
    return [(Encoding(*part), row) for part, row in zip(parts, rows, strict=True)]


@pytest.mark.parametrize("bits", range(2, 33))
def test_the_ends_of_every_grid(bits):
    half = 2 ** (bits - 1)
    assert (IntGrid(bits, True).qmin, IntGrid(bits, True).qmax) == (-half, half - 1)
    assert (IntGrid(bits, True, narrow=True).qmin, IntGrid(bits, True, narrow=True).qmax) == (1 - half, half - 1)
    assert (IntGrid(bits, False).qmin, IntGrid(bits, False).qmax) == (0, 2 * half - 1)


@given(our.grids(our.widths(2, 32), channels=3))
def test_a_width_per_channel_gives_each_its_own_ends(grid):
    widths = grid.bits if isinstance(grid.bits, tuple) else (grid.bits,)
    single = [IntGrid(bits, grid.signed, grid.narrow) for bits in widths]
    assert np.atleast_1d(grid.qmin).tolist() == [int(one.qmin) for one in single]
    assert np.atleast_1d(grid.qmax).tolist() == [int(one.qmax) for one in single]
    assert grid.qmin.shape == grid.qmax.shape == (() if isinstance(grid.bits, int) else (3,))
    assert grid.width == max(widths)


@pytest.mark.parametrize("bits", [-1, 0, 1, 33, 4.5, (8, 1), (33, 8), [8, 8]])
def test_an_impossible_width_is_refused(bits):
    with pytest.raises(EncodingError, match="is not a width from 2 to 32"):
        IntGrid(bits, signed=True)


def test_an_unsigned_grid_is_never_narrow():
    with pytest.raises(EncodingError, match="only a signed grid"):
        IntGrid(8, signed=False, narrow=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": [0.5]}, r"scale has shape \(1,\): expected \(\)"),
        ({"scale": 0.5, "axis": 0}, r"scale has shape \(\): expected \(C,\)"),
        ({"scale": [[0.5]], "axis": 0}, r"scale has shape \(1, 1\)"),
        ({"scale": 0.0}, "positive and finite, got 0.0"),
        ({"scale": -0.5}, "positive and finite, got -0.5"),
        ({"scale": np.nan}, "positive and finite, got nan"),
        ({"scale": [1.0, np.inf], "axis": 1}, "positive and finite, got inf"),
        ({"scale": 1e-50}, "positive and finite, got 0.0"),
        ({"zero_point": 128}, r"zero point 128 is not an integer of the grid \[-128, 127\]"),
        ({"zero_point": -129}, r"zero point -129 is not an integer of the grid"),
        ({"zero_point": -1, "grid": UINT8}, r"zero point -1 is not an integer of the grid \[0, 255\]"),
        ({"zero_point": -128, "grid": IntGrid(8, True, narrow=True)}, r"zero point -128 .* \[-127, 127\]"),
        ({"zero_point": 0.5}, "zero point 0.5 is not an integer"),
        ({"zero_point": np.nan}, "zero point nan is not an integer"),
        ({"zero_point": [0, 0]}, r"zero point has shape \(2,\): expected \(\)"),
        ({"scale": [1, 1], "zero_point": [0, 0, 0], "axis": 0}, r"zero point has shape \(3,\): expected \(2,\)"),
        ({"grid": IntGrid((8, 4), True)}, r"2 widths for a scale of shape \(\)"),
        ({"scale": [1, 1, 1], "grid": IntGrid((8, 4), True), "axis": 0}, r"2 widths for a scale of shape \(3,\)"),
        (
            {"scale": [1, 1], "zero_point": [9, 9], "grid": IntGrid((8, 4), True), "axis": 0},
            r"zero point 9 .* \[-8, 7\]",
        ),
    ],
)
def test_an_impossible_encoding_is_refused(fields, message):
    with pytest.raises(EncodingError, match=message):
        Encoding(**{"scale": 0.5, "zero_point": 0, "grid": INT8} | fields)


def test_a_scalar_zero_point_serves_all_channels():
    encoding = Encoding(np.ones(3), 4, UINT8, axis=0)
    assert encoding.zero_point.tolist() == [4, 4, 4]
    assert (encoding.scale.dtype, encoding.zero_point.dtype) == (np.float32, np.int64)


def test_an_encoding_cannot_be_changed():
    scale, zero_point = np.ones(2, np.float32), np.zeros(2, np.int64)
    encoding = Encoding(scale, zero_point, INT8, axis=0)
    scale[0], zero_point[0] = 2, 2
    assert encoding == Encoding([1, 1], 0, INT8, axis=0)
    with pytest.raises(FrozenInstanceError):
        encoding.axis = 1
    with pytest.raises(ValueError, match="read-only"):
        encoding.scale[0] = 2
    with pytest.raises(ValueError, match="read-only"):
        encoding.zero_point[0] = 2


DIFFERENT = [
    Encoding(1, 0, INT8),
    Encoding(np.nextafter(np.float32(1), np.float32(2)), 0, INT8),
    Encoding(1, 2, INT8),
    Encoding(1, 0, UINT8),
    Encoding(1, 0, IntGrid(8, True, narrow=True)),
    Encoding(1, 0, IntGrid(4, True)),
    Encoding([1], 0, INT8, axis=0),
    Encoding([1], 0, INT8, axis=1),
    Encoding([1], 0, IntGrid((8,), True), axis=0),
    Encoding([1, 1], 0, INT8, axis=0),
]


def test_encodings_are_equal_when_every_bit_is():
    for i, one in enumerate(DIFFERENT):
        assert [one == other for other in DIFFERENT] == [i == j for j in range(len(DIFFERENT))]
    assert len(set(DIFFERENT)) == len(DIFFERENT)
    assert Encoding(1, 0, INT8) != 1


@given(our.encodings(SHAPE))
def test_equal_encodings_have_equal_hashes(encoding):
    twin = Encoding(encoding.scale.copy(), encoding.zero_point.copy(), encoding.grid, encoding.axis)
    assert twin == encoding
    assert hash(twin) == hash(encoding)


@given(our.encodings(SHAPE, allowed=range(-126, 128)))
def test_the_exponent_is_exact(encoding):
    assert encoding.is_power_of_two
    assert encoding.exponent.shape == encoding.scale.shape
    np.testing.assert_array_equal(np.ldexp(1.0, encoding.exponent), encoding.scale)


@pytest.mark.parametrize("toward", [0, 9])
def test_a_free_scale_has_no_exponent(toward):
    free = Encoding([1, np.nextafter(np.float32(1), np.float32(toward))], 0, INT8, axis=0)
    assert not free.is_power_of_two
    with pytest.raises(NotPowerOfTwoError):
        _ = free.exponent


def test_symmetric_means_signed_without_zero_point():
    assert Encoding([1, 2], 0, INT8, axis=0).symmetric
    assert not Encoding([1, 2], [0, 2], INT8, axis=0).symmetric
    assert not Encoding(1, 0, UINT8).symmetric


@given(our.encodings(SHAPE))
def test_the_extremes_are_the_reals_of_the_grids_ends(encoding):
    extremes = np.array([encoding.minimum, encoding.maximum])
    assert extremes.dtype == np.float64
    for end, real in ((encoding.grid.qmin, encoding.minimum), (encoding.grid.qmax, encoding.maximum)):
        expected = encoding.scale.astype(np.float64) * (end - encoding.zero_point)
        np.testing.assert_array_equal(real, expected)


def test_along_shapes_channels_for_broadcasting():
    encoding = Encoding([1, 2, 4], 0, INT8, axis=1)
    assert encoding.along(encoding.scale, (2, 3, 4, 4)).shape == (1, 3, 1, 1)
    assert encoding.along(encoding.grid.qmin, (2, 3, 4, 4)).shape == ()
    assert Encoding(1, 0, INT8).along(np.float32(1), (2, 3, 4, 4)).shape == ()


TIES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)


@settings(max_examples=300)
@given(our.extreme_arrays((6,)), our.encodings(grid=our.grids(our.widths(2, 32)), allowed=range(-126, 128)))
@example(TIES, Encoding(1, 0, INT8))
@example(TIES, Encoding(1, 3, UINT8))
@example(np.array([3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0], np.float32), Encoding(2.0**-126, 0, INT8))
def test_quantize_is_the_definition(x, encoding):
    assert encoding.quantize(x).tolist() == codes(x, encoding)


@given(our.arrays(SHAPE), our.encodings(SHAPE))
def test_quantize_is_the_definition_in_every_channel(x, encoding):
    q = encoding.quantize(x)
    assert (q.shape, q.dtype) == (x.shape, np.int64)
    for (_, row), (one, reals) in zip(channels(encoding, q), channels(encoding, x), strict=True):
        assert row.tolist() == codes(reals, one)


@given(our.encodings(grid=our.grids(our.widths(2, 24)), allowed=range(-60, 60)), st.data())
def test_dequantize_is_exact_to_24_bits(encoding, data):
    q = np.array(data.draw(st.lists(st.integers(int(encoding.grid.qmin), int(encoding.grid.qmax)), min_size=1)))
    real = encoding.dequantize(q)
    assert real.dtype == np.float32
    expected = [Fraction(float(encoding.scale)) * (int(c) - int(encoding.zero_point)) for c in q]
    assert [Fraction(float(r)) for r in real] == expected


@given(our.encodings(SHAPE), st.data())
def test_quantize_undoes_dequantize(encoding, data):
    low, high = (np.broadcast_to(encoding.along(e, SHAPE), SHAPE) for e in (encoding.grid.qmin, encoding.grid.qmax))
    q = low + data.draw(st.integers(0, 2**16 - 1)) % (high - low + 1)
    np.testing.assert_array_equal(encoding.quantize(encoding.dequantize(q)), q)


@given(our.arrays(SHAPE), our.encodings(SHAPE) | our.encodings(SHAPE, power_of_2=False))
def test_fake_quantization_is_idempotent(x, encoding):
    once = encoding.fake_quantize(x)
    assert (once.shape, once.dtype) == (x.shape, np.float32)
    assert encoding.fake_quantize(once).tobytes() == once.tobytes()


@given(our.arrays((12,)), our.encodings() | our.encodings(power_of_2=False))
def test_fake_quantization_is_monotone(x, encoding):
    assert (np.diff(encoding.fake_quantize(np.sort(x))) >= 0).all()


@given(our.arrays(SHAPE), our.encodings(SHAPE))
def test_the_error_in_range_is_at_most_half_a_step_and_beyond_it_the_end_is_nearest(x, encoding):
    for one, reals in channels(encoding, x):
        nearest = np.clip(reals.astype(np.float64), one.minimum, one.maximum)
        assert (np.abs(one.fake_quantize(reals) - nearest) <= one.scale / 2).all()
        saturated = one.fake_quantize(reals)[reals != nearest]
        assert np.isin(saturated, [one.minimum, one.maximum]).all()


def test_negative_zero_and_what_rounds_to_it_become_zero():
    zeros = Encoding(1, 4, UINT8).fake_quantize([-0.0, -0.5, -1e-45])
    assert zeros.tobytes() == np.zeros(3, np.float32).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(EncodingError, match=r"^w: NaN and infinity"):
        Encoding(1, 0, INT8).quantize([0, value], "w")


@pytest.mark.parametrize("shape", [(), (2,), (3, 4), (1, 1)])
def test_a_tensor_without_the_channels_is_refused(shape):
    encoding = Encoding([1, 2, 4], 0, INT8, axis=1)
    with pytest.raises(EncodingError, match="has no 3 channels along axis 1"):
        encoding.quantize(np.zeros(shape))
    with pytest.raises(EncodingError, match="has no 3 channels along axis 1"):
        encoding.dequantize(np.zeros(shape, int))


def test_an_axis_may_count_from_the_end():
    last = Encoding([1, 2, 4], 0, INT8, axis=-1)
    assert last.quantize(np.full((2, 3), 4)).tolist() == [[4, 2, 1], [4, 2, 1]]


STORED = {
    IntGrid(4, True): TensorProto.INT4,
    IntGrid(4, False): TensorProto.UINT4,
    IntGrid(8, True): TensorProto.INT8,
    IntGrid(8, False): TensorProto.UINT8,
    IntGrid(16, True): TensorProto.INT16,
    IntGrid(16, False): TensorProto.UINT16,
}


def quantizing_model(encoding, ndim):
    """x -> QuantizeLinear -> DequantizeLinear -> y, as ONNX's checker accepts it."""
    kind = STORED[encoding.grid]
    axis = {} if encoding.axis is None else {"axis": encoding.axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"], **axis),
    ]
    shape = [f"d{i}" for i in range(ndim)]
    tensors = [
        helper.make_tensor("scale", TensorProto.FLOAT, encoding.scale.shape, encoding.scale.ravel()),
        helper.make_tensor("zero_point", kind, encoding.zero_point.shape, encoding.zero_point.ravel()),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [
        helper.make_tensor_value_info("q", kind, shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
    ]
    graph = helper.make_graph(nodes, "quantizing", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("power_of_2", [True, False])
@settings(max_examples=300)
@given(our.arrays(SHAPE), st.data())
def test_onnx_reference_gives_the_same_bits(power_of_2, x, data):
    encoding = data.draw(our.encodings(SHAPE, st.sampled_from([*STORED]), power_of_2=power_of_2))
    assume(np.abs(x).max() < encoding.scale.min() * np.float32(2**30))  # the reference casts to int32
    q, y = ReferenceEvaluator(quantizing_model(encoding, x.ndim)).run(None, {"x": x})
    np.testing.assert_array_equal(encoding.quantize(x), q.astype(np.int64))
    np.testing.assert_array_equal(encoding.fake_quantize(x), y)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("grid", [g for g in STORED if g.bits != 4], ids=str)
def test_onnxruntime_gives_the_same_bits(grid, axis):
    exponent = [-7, -3, 0, 4] if axis else -3
    middle = (grid.qmin + grid.qmax) // 4 * 2
    encoding = Encoding(power_of_two(exponent), [0, middle, 0, grid.qmax - 1] if axis else middle, grid, axis)
    ties = np.arange(-600, 600, 0.5)
    x = np.concatenate([ties * 2.0**k for k in (-7, -3, 0, 4, 9)] + [[-0.0, 1e-45, -1e-45, 1e30, -1e30, 4, 5, 6]])
    x = x.astype(np.float32).reshape(-1, 4)
    check_against_onnxruntime(encoding, x)


@pytest.mark.parametrize("grid", [INT8, UINT8], ids=str)
def test_onnxruntime_gives_the_same_bits_for_free_scales(grid):
    """The quotient is rounded to float32 before it is rounded to a code: 3.5 - 1e-8 is a tie."""
    encoding = Encoding(0.1, 3, grid)
    x = np.arange(-300, 300, 0.5, dtype=np.float32) * np.float32(0.1)
    assert (np.rint(x / np.float64(encoding.scale)) != np.rint(x / encoding.scale)).any()
    check_against_onnxruntime(encoding, np.concatenate([x, np.nextafter(x, np.float32(0))])[:, None])


def check_against_onnxruntime(encoding, x):
    model = quantizing_model(encoding, 2).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    q, y = session.run(None, {"x": x})
    np.testing.assert_array_equal(encoding.quantize(x), q)
    np.testing.assert_array_equal(encoding.fake_quantize(x), y)
