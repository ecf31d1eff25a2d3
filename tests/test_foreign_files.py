"""`validate` on QDQ files of other tools: batch sizes, biases, integer ends, scales, and what changes a value."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pow2quant.adapters import onnx_qdq
from pow2quant.errors import FileFormatError, Pow2QuantError, naming
from pow2quant.rewrites import REWRITES
from pow2quant.runs import validate
from pow2quant.validation import ort
from pow2quant.validation.agreement import compare
from pow2quant.validation.optimizers import culprits, sentence

U8, I8 = np.dtype(np.uint8), np.dtype(np.int8)
NODE = helper.make_node


class File:
    """Collects nodes with Q and DQ as quantizers write them; names are given, nothing is inferred."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.initializers = [], []

    def constant(self, name, value):
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def scale(self, name, k, zero, dtype=U8):
        return [
            self.constant(f"{name}_scale", np.ldexp(np.float32(1), k)),
            self.constant(f"{name}_zero", dtype.type(zero)),
        ]

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(NODE(op, inputs, [output], name=f"{output}_node", **attributes))
        return output

    def pair(self, source, result, k, zero, dtype=U8):
        """Q and DQ from one float tensor to the other."""
        scale = self.scale(result, k, zero, dtype)
        self.node("QuantizeLinear", [source, *scale], f"{result}_q")
        return self.node("DequantizeLinear", [f"{result}_q", *scale], result)

    def weight(self, name, shape, k=-7):
        codes = self.constant(f"{name}_codes", self.rng.integers(-127, 128, shape).astype(np.int8))
        return self.node("DequantizeLinear", [codes, *self.scale(name, k, 0, I8)], name)

    def bias(self, name, codes, k):
        stored = self.constant(f"{name}_codes", np.asarray(codes, np.int32))
        return self.node("DequantizeLinear", [stored, *self.scale(name, k, 0, np.dtype(np.int32))], name)

    def model(self, inputs, outputs):
        """inputs, outputs: (name, type, shape)."""
        ends = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
        graph = helper.make_graph(self.nodes, "g", *ends, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
        return model


def classifier(batch, requantized=False):
    """A convolution, a Reshape with the batch size in it, and a Gemm. requantized: Q-DQ-Q-DQ behind the convolution."""
    f = File()
    f.pair("x", "a", -5, 128)
    f.node("Conv", ["a", f.weight("w", (3, 2, 3, 3))], "c")
    f.pair("c", "d", -3, 128)
    if requantized:
        f.pair("d", "e", -2, 0)
    shape = f.constant("shape", np.array([batch if isinstance(batch, int) else -1, 3 * 4 * 4]))
    f.node("Reshape", ["e" if requantized else "d", shape], "r")
    f.pair("r", "s", -2 if requantized else -3, 0 if requantized else 128)
    bias = f.bias("b", f.rng.integers(-999, 999, 5), -9 if requantized else -10)
    f.node("Gemm", ["s", f.weight("v", (5, 48)), bias], "g", transB=1)
    f.pair("g", "y", 1, 128)
    return f.model([("x", TensorProto.FLOAT, [batch, 2, 6, 6])], [("y", TensorProto.FLOAT, None)])


def gemm(bias, batch, columns=4):
    f = File(1)
    f.pair("x", "a", -5, 128)
    f.node("Gemm", ["a", f.weight("w", (6, columns)), f.bias("b", bias, -12)], "c")
    f.pair("c", "y", -3, 128)
    return f.model([("x", TensorProto.FLOAT, [batch, 6])], [("y", TensorProto.FLOAT, None)])


def coded(kind_in, kind_out, batch="n", turned=False, cast=False):
    """Codes in and out. turned: channels last outside, so that codes are transposed. cast: Cast in place of the DQ."""
    f = File(2)
    types = {U8: TensorProto.UINT8, I8: TensorProto.INT8}
    source = f.node("Transpose", ["x"], "xt", perm=[0, 3, 1, 2]) if turned else "x"
    if cast:
        f.node("Cast", [source], "a", to=TensorProto.FLOAT)
    else:
        f.node("DequantizeLinear", [source, *f.scale("a", -5, 128 if kind_in == U8 else 0, kind_in)], "a")
    f.node("Conv", ["a", f.weight("w", (3, 2, 3, 3))], "c")
    scale = f.scale("y", 3 if cast else -2, 128 if kind_out == U8 else 0, kind_out)
    f.node("QuantizeLinear", ["c", *scale], "q" if turned else "y")
    if turned:
        f.node("Transpose", ["q"], "y", perm=[0, 2, 3, 1])
    shape = [batch, 6, 6, 2] if turned else [batch, 2, 6, 6]
    return f.model([("x", types[kind_in], shape)], [("y", types[kind_out], None)])


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Saves a model and validates the file, without C where it does not matter: compiling takes a second."""

    def run(model, c=False):
        onnx.save(model, tmp_path / "foreign.onnx")
        with monkeypatch.context() as patched:
            if not c:
                patched.setenv("PATH", str(tmp_path))
            return validate(tmp_path / "foreign.onnx")

    return run


def claims(found):
    return {a.executor: a.claim for a in found.agreements}


PROVED = dict.fromkeys(("onnxruntime, all optimizations", "integer engine"), "proved")


@pytest.mark.parametrize("batch", [1, 2, 5, 32, 64])
def test_a_fixed_batch_size_gets_the_verdict_and_the_analysis_of_a_free_one(batch, found):
    compiled = batch == 5
    free, fixed = found(classifier("n"), compiled), found(classifier(batch), compiled)
    assert fixed == free
    assert claims(free) == (PROVED | {"generated C": "proved"} if compiled else PROVED)
    differs = found(classifier(batch, requantized=True))
    assert differs.agreements == found(classifier("n", requantized=True)).agreements
    optimized, engine = differs.agreements
    assert optimized.claim == "differs"
    assert engine.agrees
    assert optimized.first_diverging.cause.startswith("DoubleQDQPairsRemover, an optimizer of onnxruntime, changes")


@pytest.mark.parametrize(
    ("bias", "batch", "claim"),
    [
        (np.arange(4) * 999, 4, "proved"),
        (np.arange(4)[None] * 999, 4, "proved"),
        (np.array(777), 4, "proved"),
        (np.full((4, 1), 555), 4, "proved"),
        (np.tile(np.arange(4) * 999, (4, 1)), 4, "proved"),
        (np.arange(4)[:, None] * 999, 4, None),
        (np.arange(6)[:, None] * 999, 6, None),
        (np.arange(16).reshape(4, 4) * 999, 4, None),
        (np.arange(20).reshape(5, 4) * 999, 5, None),
    ],
    ids=lambda x: str(x.shape) if isinstance(x, np.ndarray) else None,
)
def test_a_bias_is_read_by_row_and_column(bias, batch, claim, found):
    """What differs from row to row depends on a sample's place in its batch: no integers for one sample."""
    result = found(gemm(bias, batch))
    assert result.agrees
    assert claims(result)["onnxruntime, all optimizations"] == "proved"
    assert claims(result).get("integer engine") == claim
    if claim is None:
        assert "only batches of" in result.left_out["engine"]


def test_the_bound_of_a_bias_that_differs_from_row_to_row_is_that_of_its_largest_rows():
    from pow2quant.integer.certificate import certify

    rows = np.array([[5, -7000, 0, 1], [-9000, 3, 0, 2]])
    (both,) = certify(onnx_qdq.from_qdq(gemm(rows, 2))).layers
    ones = [certify(onnx_qdq.from_qdq(gemm(row, 2))).layers[0] for row in rows]
    assert both.per_channel == tuple(map(max, *(one.per_channel for one in ones)))
    assert both.raw_per_channel == tuple(map(max, *(one.raw_per_channel for one in ones)))


def test_a_difference_in_a_file_of_one_batch_size_is_followed_in_whole_batches(found):
    f = File(3)
    f.pair("x", "a", -5, 128)
    f.pair("a", "b", -4, 0)
    f.node("Gemm", ["b", f.weight("w", (6, 4)), f.bias("c", np.arange(5)[:, None] * 999, -11)], "d")
    f.pair("d", "y", -3, 128)
    result = found(f.model([("x", TensorProto.FLOAT, [5, 6])], [("y", TensorProto.FLOAT, None)]))
    (optimized,) = result.agreements
    assert optimized.claim == "differs"
    assert optimized.first_diverging.elements == 5 * 4
    assert "DoubleQDQPairsRemover" in optimized.first_diverging.cause


@pytest.mark.parametrize("kinds", [(U8, U8), (I8, I8), (U8, I8)], ids=str)
@pytest.mark.parametrize("batch", ["n", 5])
@pytest.mark.parametrize("turned", [False, True])
def test_codes_as_inputs_and_outputs(kinds, batch, turned, found):
    compiled = turned and kinds == (U8, I8)
    result = claims(found(coded(*kinds, batch, turned), compiled))
    assert result == (PROVED | {"generated C": "proved"} if compiled else PROVED)


def test_codes_that_are_cast_count_in_ones(found):
    model = coded(U8, U8, turned=True, cast=True)
    assert claims(found(model)) == PROVED
    artifact = onnx_qdq.from_qdq(model)
    assert float(artifact.encodings["x"].scale) == 1
    codes = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 2))
    (expected,) = ort.plain(onnx_qdq.to_qdq(artifact)).run([codes.astype(np.float32)])
    (got,) = ort.optimized(model).run([codes.astype(np.float32)])
    np.testing.assert_array_equal(got, expected)


def test_the_tensors_of_a_file_with_integer_ends_are_real_values():
    model = coded(U8, I8)
    batch = next(ort.random_batches(model, 4))
    tensors, (result,) = ort.plain(model).tensors(batch), ort.plain(model).run(batch)
    assert set(tensors) == {"x", "y"}
    np.testing.assert_array_equal(tensors["y"], result)
    np.testing.assert_array_equal(tensors["x"], onnx_qdq.from_qdq(model).encodings["x"].fake_quantize(batch[0]))


def test_an_integer_output_that_is_an_index_is_compared_in_ones(found):
    model = classifier("n", requantized=True)
    model.graph.node.append(NODE("ArgMax", ["y"], ["class"], axis=1, keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("class", TensorProto.INT64, None))
    optimized = found(onnx.shape_inference.infer_shapes(model)).agreements[0]
    assert optimized.claim == "differs"
    assert optimized.max_lsb in (1, 2, 3, 4)


def test_an_input_of_indices_gets_rows_of_its_table(found):
    f = File(4)
    codes = f.constant("table_codes", f.rng.integers(-127, 128, (7, 6)).astype(np.int8))
    table = f.node("DequantizeLinear", [codes, *f.scale("table", -5, 0, I8)], "table")
    f.node("Gather", [table, "x"], "a")
    f.pair("a", "b", -5, 0, I8)
    f.node("MatMul", ["b", f.weight("w", (6, 4))], "c")
    f.pair("c", "y", -3, 128)
    model = f.model([("x", TensorProto.INT64, ["n", 3])], [("y", TensorProto.FLOAT, None)])
    (batch,) = next(ort.random_batches(model, 20))
    assert set(batch.ravel()) == set(range(7))
    assert found(model).agrees


def test_scales_that_cannot_be_read_say_what_they_are(tmp_path):
    half, blocks = tmp_path / "half.onnx", tmp_path / "blocks.onnx"
    for path in (half, blocks):
        f = File(5)
        f.pair("x", "a", -5, 128)
        codes = f.constant("w_codes", np.ones((8, 4), np.int8))
        scale = np.float16(0.5) if path == half else np.full((2, 4), 0.5, np.float32)
        more = {} if path == half else {"axis": 0}
        f.node("DequantizeLinear", [codes, f.constant("s", scale)], "w", **more)
        weight = f.node("Cast", ["w"], "v", to=TensorProto.FLOAT) if path == half else "w"
        f.node("MatMul", ["a", weight], "c")
        f.pair("c", "y", -3, 128)
        onnx.save(f.model([("x", TensorProto.FLOAT, ["n", 8])], [("y", TensorProto.FLOAT, None)]), path)
    with pytest.raises(FileFormatError, match=r"half\.onnx: node DequantizeLinear w_node has a scale of type float16"):
        validate(half)
    with pytest.raises(FileFormatError, match=r"blocks\.onnx: .* block of unknown size along axis 0 \(block-wise"):
        validate(blocks)


def test_every_error_names_the_file_once(tmp_path):
    model = classifier("n")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "free.onnx")
    with pytest.raises(Pow2QuantError) as error:
        validate(tmp_path / "free.onnx")
    assert str(error.value).count("free.onnx") == 1
    with pytest.raises(FileFormatError, match=r"^a\.onnx: wrong$"), naming(Path("a.onnx")):
        raise FileFormatError("a.onnx: wrong")


def test_a_difference_that_an_optimizer_makes_is_never_laid_on_the_certificate():
    model = classifier("n", requantized=True)
    artifact = onnx_qdq.from_qdq(model)
    batches = list(ort.random_batches(model, 64))
    (result,) = compare(ort.plain(model), [ort.optimized(model)], batches, artifact, proof=True)
    assert result.claim == "differs"
    assert "DoubleQDQPairsRemover" in result.first_diverging.cause
    assert not any("certificate" in note for note in result.notes)


@pytest.mark.parametrize("guilty", [(0,), (3, 40), (17, 18), (-1,), ()])
def test_the_optimizers_that_change_a_value_are_found(guilty):
    names = [rewrite.name for rewrite in REWRITES]
    chosen = {names[i] for i in guilty}
    assert set(culprits(lambda disabled: bool(chosen) and chosen <= set(disabled))) == chosen
    either = culprits(lambda disabled: names[3] in disabled or names[9] in disabled)
    assert either in ([names[3]], [names[9]])


def test_what_is_told_of_optimizers():
    assert sentence("it", ["A"]).startswith("A, an optimizer of onnxruntime, changes values")
    assert sentence("it", ["A", "B"]).startswith("A and B, optimizers of onnxruntime, change values")
    assert "the graph optimizations of it change" in sentence("it", [])
