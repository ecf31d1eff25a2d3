"""The QDQ format: exact round trips, the same bits in onnxruntime, foreign files, and errors that name the culprit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pow2quant.adapters.files import GRIDS
from pow2quant.adapters.onnx_qdq import export_qdq, from_qdq, load, save, to_qdq
from pow2quant.artifact import Artifact
from pow2quant.errors import ConfigError, EncodingError, FileFormatError, OutputError, UnsupportedModelError
from pow2quant.integer.certificate import certify
from pow2quant.integer.emit_c import code
from pow2quant.integer.lower import lower
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.validation.ort import optimized, plain, random_batches
from tests.qdq_networks import ALL, DISABLED, assert_same, encoding, model_of, network, on_grid, run
from tests.quantized_graphs import residual_network
from tests.strategies import encodings, grids, widths


def fake_quantized(artifact, x):
    """The first graph output: ONNX's reference implementation, node by node, and numpy's fake quantization."""
    graph, table = artifact.model.graph, artifact.encodings

    def quantized(name, value):
        return table[name].fake_quantize(value) if name in table else np.asarray(value)

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values[graph.input[0].name] = quantized(graph.input[0].name, x)
    for node in graph.node:
        results = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input})
        values |= {name: quantized(name, v) for name, v in zip(node.output, results, strict=False)}
    return values[graph.output[0].name]


WIDTHS = [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (2, 8), (4, 8), (8, 4), (16, 3), (3, 12), (4, 10)]


@pytest.mark.parametrize(("w", "a"), WIDTHS)
@pytest.mark.parametrize("signed", [False, True])
def test_onnxruntime_gives_the_bits_of_the_fake_quantized_network(w, a, signed):
    artifact = network(w, a, signed, narrow=w % 2 == 1)
    model = to_qdq(artifact)
    onnx.checker.check_model(model, full_check=True)
    assert_same(from_qdq(model), artifact)
    x = np.random.default_rng(0).normal(0, 2, (64, 2, 4, 4)).astype(np.float32)
    expected = fake_quantized(artifact, x)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(run(model, x, DISABLED), expected)
    np.testing.assert_array_equal(run(model, x, ALL), expected)


def test_storage():
    artifact = network(5, 6)
    model = to_qdq(artifact)
    types = {t.name: TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert types["conv1.weight_quantized"] == "INT8"
    assert types["conv1.bias_quantized"] == types["conv1.bias_zero_point"] == "INT32"
    assert types["x_zero_point"] == "UINT8"
    ops = [node.op_type for node in model.graph.node]
    quantized = set(artifact.encodings) - {t.name for t in artifact.model.graph.initializer}
    assert ops.count("QuantizeLinear") == len(quantized)
    assert ops.count("Clip") == len(quantized) - len(["pool", "concat", "flatten"])
    assert ops.count("DequantizeLinear") == len(artifact.encodings)
    assert [v.name for v in model.graph.output] == ["y"]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert "neg.output" in {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    assert (model.ir_version, model.opset_import[0].version) == (10, 21)
    wide = {t.name: TensorProto.DataType.Name(t.data_type) for t in to_qdq(network(3, 16)).graph.initializer}
    assert (wide["conv1.weight_quantized"], wide["x_zero_point"]) == ("INT4", "UINT16")
    assert "Clip" not in {node.op_type for node in to_qdq(network(3, 16)).graph.node}
    assert "INT16" in {TensorProto.DataType.Name(t.data_type) for t in to_qdq(network(9, 8)).graph.initializer}


def test_weights_of_four_bits_in_bytes_are_the_same_network_and_run_on_integers(tmp_path):
    given = residual_network()

    def types(artifact):
        found = {t.name: t.data_type for t in to_qdq(artifact).graph.initializer}
        return found["project.weight_quantized"], found["project.bias_quantized"]

    assert types(given) == (TensorProto.INT4, TensorProto.INT32)
    assert types(given.stored_in("int8")) == (TensorProto.INT8, TensorProto.INT32)
    read = from_qdq(load(export_qdq(given, tmp_path, storage="int8", opset=13)))
    assert read.encodings == given.encodings
    assert read.encodings["project.weight"].grid.bits == 4
    assert certify(read).to_json() == certify(given).to_json()
    assert code(lower(read)) == code(lower(given))
    x = [np.concatenate(batch) for batch in zip(*random_batches(to_qdq(given), 64), strict=True)]
    for way in (plain, optimized):
        np.testing.assert_array_equal(way(tmp_path / "model.onnx").run(x)[0], optimized(to_qdq(given)).run(x)[0])
    assert types(read) == types(given.stored_in("int8"))
    assert types(read.stored_in("int4")) == types(given)
    with pytest.raises(ConfigError, match="storage: 'int5' is not legal; legal: int4 and int8"):
        given.stored_in("int5")


def test_without_our_metadata_the_width_of_the_storage_counts():
    model = to_qdq(network(5, 8))
    del model.metadata_props[:]
    read = from_qdq(model).encodings
    assert read["conv1.weight"].grid == IntGrid(8, True)
    assert read["x"] == network(5, 8).encodings["x"]


@st.composite
def artifacts(draw):
    """A network of one Gemm with any encoding at each of its tensors; each may also stay float."""
    n, power_of_2 = draw(st.integers(1, 4)), draw(st.booleans())
    bias = draw(encodings((n,), grids(widths(2, 32), signed=st.just(True)), power_of_2=power_of_2))
    table = {
        "x": draw(encodings(power_of_2=power_of_2)),
        "fc.weight": draw(encodings((n, 3), power_of_2=power_of_2)),
        "fc.bias": Encoding(bias.scale, 0, bias.grid, bias.axis),
        "y": draw(encodings(power_of_2=power_of_2)),
    }
    shapes = {"fc.weight": (n, 3), "fc.bias": (n,)}
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    values = {name: on_grid(rng, shape, table[name], spread=1 << 20) for name, shape in shapes.items()}
    node = helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], "fc", transB=1)
    model = model_of([node], {"x": ["N", 3]}, {"y": ["N", n]}, values)
    kept = draw(st.sets(st.sampled_from(sorted(table))))
    return Artifact(model, {name: enc for name, enc in table.items() if name in kept})


@settings(max_examples=150)
@given(artifacts())
def test_round_trip_is_exact(artifact):
    model = to_qdq(artifact)
    onnx.checker.check_model(model, full_check=True)
    assert_same(from_qdq(model), artifact)
    assert_same(from_qdq(onnx.load_from_string(model.SerializeToString())), artifact)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11, 16])
def test_clip_is_exact_for_free_scales(bits, signed):
    grid = IntGrid(bits, signed, narrow=signed)
    free = Encoding(np.float32(0.37), np.int64(grid.qmin + 1), grid)
    model = model_of(
        [helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])], {"x": ["N"]}, {"y": ["N"]}, {}
    )
    artifact = Artifact(model, {"x": free, "y": free})
    ends = np.linspace(-3, 3, 501) + np.array([[free.minimum], [0], [free.maximum]])
    x = np.concatenate([ends.ravel(), free.scale * (np.arange(-50, 50) + 0.5), [-3e38, 3e38]]).astype(np.float32)
    for level in (DISABLED, ALL):
        np.testing.assert_array_equal(run(to_qdq(artifact), x, level), fake_quantized(artifact, x))


def test_initializers_that_are_listed_as_inputs():
    """As files before IR version 4 have it."""
    listed = network().model
    listed.graph.input.append(helper.make_tensor_value_info("conv1.weight", TensorProto.FLOAT, [4, 2, 3, 3]))
    x = np.random.default_rng(0).normal(0, 2, (3, 2, 4, 4)).astype(np.float32)
    model = to_qdq(Artifact(listed, network().encodings))
    assert [value.name for value in model.graph.input] == ["x"]
    np.testing.assert_array_equal(run(model, x), fake_quantized(network(), x))


def test_names_that_are_taken_are_avoided():
    nodes = [
        helper.make_node("Relu", ["x"], ["x_dequantized"], "x/QuantizeLinear"),
        helper.make_node("Neg", ["x_dequantized"], ["x_scale"], "x_quantized"),
    ]
    model = model_of(nodes, {"x": ["n", 3]}, {"x_scale": ["n", 3]}, {})
    artifact = Artifact(model, {n: encoding(-4, 8, zero_point=128) for n in ("x", "x_dequantized", "x_scale")})
    onnx.checker.check_model(to_qdq(artifact), full_check=True)
    assert_same(from_qdq(to_qdq(artifact)), artifact)


def test_axes_other_than_0_and_unused_results():
    w, rng = encoding([-3, -2], 4, True, axis=1), np.random.default_rng(0)
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["t"], "up"),
        helper.make_node("MaxPool", ["t"], ["y", ""], "pool", kernel_shape=[1, 1]),
    ]
    model = model_of(nodes, {"x": ["N", 3, 2, 2]}, {"y": ["N", 2, 2, 2]}, {"w": on_grid(rng, (3, 2, 1, 1), w)})
    artifact = Artifact(model, {"x": encoding(-4), "w": w, "t": encoding([0, 1], axis=1), "y": encoding(-4)})
    assert_same(from_qdq(to_qdq(artifact)), artifact)
    x = rng.normal(0, 2, (1, 3, 2, 2)).astype(np.float32)
    expected = fake_quantized(artifact, x)
    np.testing.assert_array_equal(run(to_qdq(artifact), x), expected)


def test_requantization_is_an_identity_that_bears_the_encoding():
    fine, coarse = encoding(-4), encoding(-2, zero_point=2)
    nodes = [
        helper.make_node("Identity", ["x"], ["t"], "requantize"),
        helper.make_node("Relu", ["t"], ["y"], "relu"),
    ]
    artifact = Artifact(model_of(nodes, {"x": ["N"]}, {"y": ["N"]}, {}), {"x": fine, "t": coarse, "y": coarse})
    assert_same(from_qdq(to_qdq(artifact)), artifact)
    x = np.random.default_rng(0).normal(0, 9, 50).astype(np.float32)
    np.testing.assert_array_equal(run(to_qdq(artifact), x, ALL), fake_quantized(artifact, x))


# Other tools' files


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda _: "{", "metadata: pow2quant.grids: not JSON"),
        (lambda _: "[]", "metadata: pow2quant.grids: expected an object, got list"),
        (lambda t: t.replace("narrow", "wide"), "pow2quant.grids: .*: expected the keys bits, signed, narrow and axis"),
        (lambda t: t.replace('"bits": 5', '"bits": true'), "conv1.weight: impossible grid"),
        (lambda t: t.replace('"bits": 5', '"bits": 77'), "conv1.weight: bits: 77 is not a width"),
        (lambda t: t.replace('"bits": 5', '"bits": 11'), "conv1.weight/DequantizeLinear stores 8 bits, which cannot"),
        (lambda t: t.replace('"bits": 5', '"bits": 2'), "conv1.weight/DequantizeLinear holds values off the grid"),
        (lambda t: t.replace('"axis": 0', '"axis": null'), "conv1.weight/DequantizeLinear does not fit the metadata"),
        (lambda t: t.replace('"bits": 6', '"bits": 7', 1), "metadata: pow2quant.grids: x is not quantized to the grid"),
        (lambda t: t.replace('"bits": 6', '"bits": 7'), "relu1.output/QuantizeLinear has no Clip to the 7 bits"),
    ],
)
def test_corrupt_metadata(change, text):
    model = to_qdq(network(5, 6))
    for entry in model.metadata_props:
        entry.value = change(entry.value) if entry.key == GRIDS else entry.value
    with pytest.raises(FileFormatError, match=text):
        from_qdq(model)


# Errors in writing


@pytest.mark.parametrize(
    ("name", "enc", "text"),
    [
        ("conv9.weight", encoding(-3), "no tensor conv9.weight"),
        ("conv1.weight", encoding([-7, -7], 8, True, axis=0), r"conv1.weight: 2 scales on axis 0 .*\(4, 2, 3, 3\)"),
        ("conv1.weight", encoding(-3, 8, True), "conv1.weight: .* values are not on the grid"),
        ("conv1.weight", encoding(-9, 4, True), "conv1.weight: .* values are not on the grid"),
        ("conv1.bias", encoding(-15, 32, False), "conv1.bias: ONNX has no type for 32 bits, unsigned"),
        ("y", encoding(-8, 20, True), "y: ONNX has no type for 20 bits, signed: .* 8, 16 bits"),
        ("conv2.output", encoding([0, 0, 0, 0], 5, axis=1), "conv2.output: 5 bits per channel"),
    ],
)
def test_encodings_that_cannot_be_written(name, enc, text):
    artifact = network()
    with pytest.raises(EncodingError, match=text):
        to_qdq(Artifact(artifact.model, artifact.encodings | {name: enc}))


def test_weights_that_are_not_finite_or_not_float32():
    for values, text in ((np.float32([[np.nan]]), "NaN"), (np.float64([[1]]), "float64")):
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        model = model_of([helper.make_node("Neg", ["w"], ["y"])], {}, {"y": [1, 1]}, {"w": values})
        model.graph.output[0].type.tensor_type.elem_type = kind
        with pytest.raises(EncodingError, match=f"^w: .*{text}"):
            to_qdq(Artifact(model, {"w": encoding(0, 8, True)}))


def test_control_flow_is_refused():
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["t"])], "b", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, [1])]
    )
    node = helper.make_node("If", ["c"], ["y"], "branch", then_branch=then, else_branch=then)
    model = model_of([node], {"x": [1]}, {"y": [1]}, {"c": np.array(True)})
    for act in (lambda: to_qdq(Artifact(model, {})), lambda: from_qdq(model)):
        with pytest.raises(UnsupportedModelError, match="If branch"):
            act()


# Files


def test_export_and_load(tmp_path):
    artifact = network()
    path = export_qdq(artifact, tmp_path / "new")
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert_same(from_qdq(load(path)), artifact)
    export_qdq(network(4), tmp_path / "new")
    assert from_qdq(load(path)).encodings == network(4).encodings


def test_corrupt_files_are_named(tmp_path):
    good = to_qdq(network()).SerializeToString()
    contents = {f"truncated-{n}": good[:n] for n in (1, 7, 100, len(good) // 2, len(good) - 40, len(good) - 1)}
    contents |= {f"random-{n}": np.random.default_rng(n).bytes(300) for n in range(5)}
    contents |= {"empty": b"", "json.onnx": b'{"version": "1.0.0"}', "json.json": b'{"version": "1.0.0"}'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    external = onnx.load_from_string(good)
    onnx.save(external, tmp_path / "external", save_as_external_data=True, location="data", size_threshold=0)
    assert from_qdq(load(tmp_path / "external")).encodings == network().encodings
    (tmp_path / "data").unlink()
    for name in (*contents, "external", "missing"):
        with pytest.raises(
            FileFormatError,
            match=rf"^{tmp_path / name}: (not a valid ONNX file: .|cannot be read: (no such file|is empty))",
        ) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_output_errors_leave_no_temporary_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/model.onnx: cannot be written: "):
        export_qdq(network(), tmp_path / "file")
    path = tmp_path / "model.onnx"
    path.write_text("previous")
    code = (  # a limit on the size of files is what a full disk does, without root
        "import resource, signal, sys; from pathlib import Path; import onnx\n"
        "from pow2quant.adapters.onnx_qdq import save\n"
        "model = onnx.helper.make_model(onnx.helper.make_graph([], 'g' * 5000, [], []))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "save(model, Path(sys.argv[1]))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "OutputError" in result.stderr.splitlines()[-1]
    assert "File too large" in result.stderr.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model.onnx"]
    assert path.read_text() == "previous"
    save(onnx.ModelProto(ir_version=10), path)
    assert path.read_text() != "previous"
