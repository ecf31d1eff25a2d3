"""Agreement between executors: real onnxruntime sessions, and executors that are wrong on purpose."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pow2quant.adapters import aimet_encodings
from pow2quant.adapters.onnx_qdq import export_qdq, from_qdq, save, to_qdq
from pow2quant.errors import DataError, FileFormatError
from pow2quant.integer.certificate import certify
from pow2quant.pow2_constraints import Encoding
from pow2quant.validation.agreement import SUSPECTS, Executor, compare
from pow2quant.validation.ort import BATCH, executors, inspect, lacks_vnni, optimized, options, plain, random_batches
from tests.quantized_graphs import Graph, encoding, residual_network


def inputs(artifact, count=64, seed=0):
    return random_batches(to_qdq(artifact), count, seed)


def altered(executor, name, change_outputs=lambda y: y, change_tensors=lambda t: t):
    """An executor whose results somebody tampers with."""

    def run(batch):
        return [change_outputs(y.copy()) for y in executor.run(batch)]

    def tensors(batch):
        return change_tensors({name: x.copy() for name, x in executor.tensors(batch).items()})

    return Executor(name, run, tensors)


@pytest.fixture(scope="module")
def network():
    return residual_network()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    """What a run leaves: model.onnx, model_float.onnx, model.encodings."""
    path = tmp_path_factory.mktemp("run")
    export_qdq(network, path)
    save(network.model, path / "model_float.onnx")
    aimet_encodings.export_1_0_0(network, path)
    return path


def test_four_executors_from_disk_agree_and_it_is_proved(network, folder):
    found = executors(folder / "model.onnx", (folder / "model_float.onnx", folder / "model.encodings"))
    assert [executor.name for executor in found] == [
        "onnxruntime, no optimization",
        "onnxruntime, all optimizations",
        "onnxruntime, no optimization, from model_float.onnx + model.encodings",
        "onnxruntime, all optimizations, from model_float.onnx + model.encodings",
    ]
    done = []
    results = compare(found[0], found[1:], inputs(network, 100), network, proof=certify(network), on_batch=done.append)
    assert done == [32, 64, 96, 100]
    for result in results:
        assert result.agrees
        assert (result.elements, result.differing, result.max_lsb, result.top1_agreement) == (1000, 0, 0.0, 100.0)
        assert (result.claim, result.first_diverging, result.against) == ("proved", None, found[0].name)


def test_files_with_the_same_bytes_run_once(network, folder, tmp_path, monkeypatch):
    """The pair rebuilds model.onnx to the byte, and opens no session; with one other zero point it opens its own."""
    opened, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *given, **how: opened.append(1) or session(*given, **how)
    )
    document = json.loads((folder / "model.encodings").read_text())
    (entry,) = (e for e in document["activation_encodings"] if e["name"] == "x")
    entry["offset"] = [z - 2 for z in entry["offset"]]
    (tmp_path / "model.encodings").write_text(json.dumps(document))
    for where, sessions, same in ((folder, 2, True), (tmp_path, 4, False)):
        opened.clear()
        found = executors(folder / "model.onnx", (folder / "model_float.onnx", where / "model.encodings"))
        results = [e.run(next(inputs(network))) for e in found]
        assert len(opened) == sessions
        assert [np.array_equal(r[0], results[0][0]) for r in results] == [True, True, same, same]


def test_a_batch_that_was_filled_with_other_values_runs_again(network, folder):
    x = next(inputs(network))
    first, _, again, _ = executors(folder / "model.onnx", (folder / "model_float.onnx", folder / "model.encodings"))
    before = first.run(x)[0]
    x[0][:] = 0
    assert not np.array_equal(again.run(x)[0], before)
    assert np.array_equal(again.run(x)[0], plain(folder / "model.onnx").run(x)[0])


def test_without_a_proof_agreement_is_only_observed(network):
    model = to_qdq(network)
    (result,) = compare(plain(model), [optimized(model)], inputs(network, 40), network)
    assert result.claim == "observed on 40 inputs"


def test_one_element_that_is_one_lsb_off_is_caught(network):
    reference = plain(to_qdq(network))
    lsb = network.encodings["fc.output"].scale

    def nudge(y):
        if len(y) == BATCH:
            y[17, 3] += lsb
        return y

    wrong = altered(reference, "wrong", nudge)
    (result,) = compare(reference, [wrong], inputs(network, 40), network, proof=certify(network))
    assert (result.differing, result.elements, result.max_lsb, result.claim) == (1, 400, 1.0, "differs")
    assert "the certificate proves that nothing can differ" in result.notes[-1]
    assert result.first_diverging is None  # a single sample is no full batch: the executor behaves when it is run again
    assert "no tensor differs when 1 of the differing samples are run again" in result.notes[0]


@pytest.mark.parametrize("tensor", ["stem_relu.output", "residual.output", "fc.output"])
def test_the_first_tensor_that_differs_is_named(network, tensor):
    reference = plain(to_qdq(network))
    order = [name for node in network.model.graph.node for name in node.output]

    def nudge(tensors):
        for name in order[order.index(tensor) :]:
            if name in tensors:
                tensors[name].flat[5] += 2 * network.encodings[name].scale
        return dict(reversed(tensors.items()))  # the order of the dictionary does not matter

    wrong = altered(reference, "wrong", lambda y: y + 1, nudge)
    (result,) = compare(reference, [wrong], inputs(network), network)
    found = result.first_diverging
    assert (found.tensor, found.node) == (tensor, tensor.removesuffix(".output"))
    assert (found.differing, found.max_lsb, found.cause) == (1, 2.0, None)
    assert found.elements == reference.tensors([np.zeros((SUSPECTS, 3, 12, 12), np.float32)])[tensor].size


def test_a_wrongly_quantized_graph_input_is_named(network):
    reference = plain(to_qdq(network))
    wrong = altered(reference, "wrong", lambda y: y + 1, lambda t: t | {"x": t["x"] + 1})
    (result,) = compare(reference, [wrong], inputs(network), network)
    assert (result.first_diverging.tensor, result.first_diverging.node) == ("x", "")
    assert result.first_diverging.cause.startswith("the graph input is quantized differently: one constant")


def test_odd_zero_points_differ_in_onnxruntime_and_the_addition_is_named():
    artifact = residual_network(add_zero_point=1)
    model = to_qdq(artifact)
    (result,) = compare(plain(model), [optimized(model)], inputs(artifact), artifact, proof=certify(artifact))
    assert result.claim == "differs"
    assert result.notes == ()
    found = result.first_diverging
    assert (found.tensor, found.node, found.max_lsb) == ("residual.output", "residual", 1.0)
    assert "the zero point 101 is odd: onnxruntime, all optimizations adds it before rounding" in found.cause


def test_float_biases_differ_in_onnxruntime_and_the_bias_is_named():
    artifact = residual_network()
    for name in [name for name in artifact.encodings if name.endswith(".bias")]:
        del artifact.encodings[name]
    for tensor in artifact.model.graph.initializer:
        if tensor.name.endswith(".bias"):
            off = onnx.numpy_helper.to_array(tensor) * np.float32(1.37)
            tensor.CopyFrom(onnx.numpy_helper.from_array(off, tensor.name))
    model = to_qdq(artifact)
    (result,) = compare(plain(model), [optimized(model)], inputs(artifact, 500), artifact, proof=certify(artifact))
    assert result.claim == "differs"
    assert "bias has no encoding" in result.first_diverging.cause


def test_accumulators_beyond_float32_are_named():
    g = Graph()
    rng = np.random.default_rng(0)
    x = g.input("x", (512,), encoding(-8, 0, 16))
    y = g.layer("Gemm", "fc", x, rng.integers(-128, 128, (16, 512)), grid=encoding(-11, 2**15, 16), k=-7, transB=1)
    artifact = g.artifact(y)
    reference = plain(to_qdq(artifact))
    exact = rng.permutation(512)

    def shuffled(batch):  # the same sum in another order
        weight = next(i for i in artifact.model.graph.initializer if i.name == "fc.weight")
        w = onnx.numpy_helper.to_array(weight)[:, exact]
        sums = np.zeros((len(batch[0]), 16), np.float32)
        for column, values in zip(artifact.encodings["x"].fake_quantize(batch[0])[:, exact].T, w.T, strict=True):
            sums += column[:, None] * values
        return [artifact.encodings["fc.output"].fake_quantize(sums)]

    other = Executor("another order", shuffled, lambda batch: {"fc.output": shuffled(batch)[0]})
    (result,) = compare(reference, [other], inputs(artifact, 200), artifact, proof=certify(artifact))
    assert result.claim == "differs"
    assert "the accumulator may reach" in result.first_diverging.cause


@pytest.mark.parametrize(
    ("text", "machine", "expected"),
    [
        ("flags\t: fpu avx2 avx512f avx512_vnni\n", "x86_64", False),
        ("flags\t: fpu avx2 avx_vnni\n", "AMD64", False),
        ("flags\t: fpu avx2 avx512f\n", "x86_64", True),
        (None, "x86_64", True),
        (None, "aarch64", False),
    ],
)
def test_vnni_is_read_from_the_processors_flags(tmp_path, text, machine, expected):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert lacks_vnni(path, machine) is expected


def constant(*outputs):
    return Executor("constant", lambda batch: [np.array(y, np.float32) for y in outputs], lambda batch: {})


def identity(grid=None):
    g = Graph()
    return g.artifact(g.node("Identity", "y", [g.input("x", (3,), encoding(0))], grid))


@pytest.mark.parametrize(
    ("a", "b", "differing", "lsb"),
    [
        ([[0.0, 1.0, 2.0]], [[-0.0, 1.0, 2.0]], 0, 0.0),
        ([[np.nan, 1.0, 2.0]], [[np.nan, 1.0, 2.0]], 1, np.inf),
        ([[1.0, 1.0, 2.0]], [[np.inf, 1.0, 2.0]], 1, np.inf),
        ([[np.inf, 1.0, 2.0]], [[np.inf, 1.5, 2.0]], 1, 2.0),
        ([[0.0, 1.0, 2.0]], [[0.25, 1.0, 3.0]], 2, 4.0),
    ],
)
def test_values_are_compared_and_measured_in_the_outputs_scale(a, b, differing, lsb):
    (result,) = compare(constant(a), [constant(b)], [[np.zeros((1, 3))]], identity(encoding(-2)))
    assert (result.differing, result.max_lsb) == (differing, lsb)
    assert result.agrees is (differing == 0)


def test_samples_that_differ_in_any_output_are_run_again():
    g = Graph()
    x = g.input("x", (3,), encoding(0))
    artifact = g.artifact(g.node("Relu", "y", [x], encoding(0)), g.node("Neg", "z", [x], encoding(-1)))
    zeros, first, second = np.zeros((4, 3)), np.eye(4, 3), np.eye(4, 3, -1)
    (result,) = compare(constant(zeros, zeros), [constant(first, second)], [[zeros]], artifact)
    assert (result.elements, result.differing, result.max_lsb) == (24, 6, 2.0)
    seen = []
    other = constant(first, second)
    counted = replace(other, run=lambda batch: seen.append(len(batch[0])) or other.run(batch))
    compare(constant(zeros, zeros), [counted], [[zeros]], artifact)
    assert seen == [4, 4]  # the first differs in samples 0 to 2, the second in 1 to 3


def test_a_float_output_is_measured_in_ulps():
    a = np.array([[1.0, 2.0, 3.0]], np.float32)
    b = np.nextafter(np.nextafter(a, np.float32(9)), np.float32(9))
    (result,) = compare(constant(a), [constant(b)], [[np.zeros((1, 3))]], identity())
    assert (result.differing, result.max_lsb) == (3, 2.0)
    assert result.first_diverging.tensor == "y.output"


def test_top1_counts_the_largest_logit_of_every_sample():
    a = [[1, 2, 3], [3, 2, 1], [1, 3, 2], [1, 3, 2]]
    b = [[1, 3, 2], [3, 0, 1], [1, 3, 2], [1, 3, 2]]
    (result,) = compare(constant(a), [constant(b)], [[np.zeros((4, 3))]], identity(encoding(0)))
    assert result.top1_agreement == 75.0


@given(
    hnp.arrays(np.float32, (6, 5), elements=st.integers(0, 3)),
    hnp.arrays(np.float32, (6, 5), elements=st.integers(0, 3)),
)
def test_the_counts_do_not_depend_on_how_the_inputs_are_batched(a, b):
    def executor(values):
        return Executor("table", lambda batch: [values[batch[0][:, 0].astype(int)]], lambda batch: {})

    rows = np.arange(6, dtype=np.float32)[:, None].repeat(3, 1)
    artifact = identity(encoding(0))
    whole, split = (
        compare(executor(a), [executor(b)], batches, artifact)[0]
        for batches in ([[rows]], [[rows[:1]], [rows[1:5]], [rows[5:]]])
    )
    assert whole == split
    assert whole.differing == (a != b).sum()
    assert whole.max_lsb == np.abs(a - b).max()


def test_batches_are_streamed_and_the_reference_runs_once_for_each(network):
    calls = []
    model = to_qdq(network)
    reference = plain(model)
    counted = replace(reference, run=lambda batch: calls.append("reference") or reference.run(batch))

    def stream():
        for batch in inputs(network, 96):
            calls.append("batch")
            yield batch

    compare(counted, [plain(model), optimized(model)], stream(), network)
    assert calls == ["batch", "reference"] * 3


def test_nothing_to_compare_is_an_error(network):
    with pytest.raises(DataError, match="no inputs"):
        compare(plain(to_qdq(network)), [], [], network)


def test_outputs_of_another_shape_are_an_error():
    with pytest.raises(DataError, match=r"constant: outputs of shape \[\(1, 2\)\] instead of \[\(1, 3\)\]"):
        compare(constant([[1, 2, 3]]), [constant([[1, 2]])], [[np.zeros((1, 3))]], identity())


@pytest.mark.parametrize("make", [plain, optimized])
def test_tensors_are_every_activation_on_its_grid(network, make):
    executor = make(to_qdq(network))
    (batch,) = inputs(network, 8)
    tensors = executor.tensors(batch)
    constants = {tensor.name for tensor in network.model.graph.initializer}
    order = ["x", *(name for node in network.model.graph.node for name in node.output)]
    assert list(tensors) == [name for name in order if name in network.encodings.keys() - constants]
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, network.encodings[name].fake_quantize(values))
    np.testing.assert_array_equal(tensors["x"], network.encodings["x"].fake_quantize(batch[0]))
    np.testing.assert_array_equal(tensors["fc.output"], executor.run(batch)[0])
    stage = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(network.model)).extract_model(
        ["concat.output"], ["global.output"]
    )
    (exact,) = plain(stage).run([tensors["concat.output"]])
    np.testing.assert_array_equal(tensors["global.output"], network.encodings["global.output"].fake_quantize(exact))


def optimized_operators(model, path):
    import onnxruntime

    session = options(optimized=True)
    session.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), session, providers=["CPUExecutionProvider"])
    layout = ("Transpose", "ReorderInput", "ReorderOutput")
    return Counter(node.op_type for node in onnx.load(path).graph.node if node.op_type not in layout)


def test_exposed_codes_leave_the_fusions_and_exposed_floats_would_not(network, tmp_path):
    model = to_qdq(network)
    fused = optimized_operators(model, tmp_path / "plain.onnx")
    assert fused.keys() >= {"QLinearConv", "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QGemm"}

    def exposed(kind):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        names = [node.output[0] for node in model.graph.node if node.op_type == kind and "weight" not in node.name]
        known = {value.name for value in model.graph.output}
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
        return optimized_operators(copy, tmp_path / f"{kind}.onnx")

    assert exposed("QuantizeLinear") == fused
    assert exposed("DequantizeLinear") != fused


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 12, 16])
def test_other_widths_run_in_every_executor(bits):
    g = Graph()
    rng = np.random.default_rng(bits)
    x = g.input("x", (4, 6, 6), encoding(-2, 2, bits))
    weight = rng.integers(-2, 2, (4, 4, 3, 3))
    y = g.layer("Conv", "conv", x, weight, rng.integers(-9, 9, 4), encoding(0, 2, bits), k=[-2] * 4, bits=min(bits, 8))
    artifact = g.artifact(y)
    model = to_qdq(artifact)
    (result,) = compare(plain(model), [optimized(model)], inputs(artifact, 200), artifact, proof=certify(artifact))
    assert result.claim == "proved"
    (batch,) = inputs(artifact, 8)
    for executor in (plain(model), optimized(model)):
        tensors = executor.tensors(batch)
        np.testing.assert_array_equal(tensors["x"], artifact.encodings["x"].fake_quantize(batch[0]))
        np.testing.assert_array_equal(tensors["conv.output"], executor.run(batch)[0])


def test_a_file_of_another_tool_runs_and_its_tensors_have_names(tmp_path):
    """Q and DQ without a zero point, names as onnxruntime's quantizer gives them."""
    make, scale = onnx.helper.make_node, onnx.numpy_helper.from_array(np.float32(0.1), "s")
    weight = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    nodes = [
        make("QuantizeLinear", ["x", "s"], ["x_QuantizeLinear_Output"]),
        make("DequantizeLinear", ["x_QuantizeLinear_Output", "s"], ["x_DequantizeLinear_Output"]),
        make("QuantizeLinear", ["w", "s"], ["w_quantized"]),
        make("DequantizeLinear", ["w_quantized", "s"], ["w_dequantized"]),
        make("MatMul", ["x_DequantizeLinear_Output", "w_dequantized"], ["r"]),
        make("QuantizeLinear", ["r", "s"], ["r_QuantizeLinear_Output"]),
        make("DequantizeLinear", ["r_QuantizeLinear_Output", "s"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, ["n", 3])], [value("y", 1, ["n", 3])], [scale, weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    save(model, tmp_path / "foreign.onnx")
    assert inspect(tmp_path / "foreign.onnx") == [(name, pytest.approx(0.1)) for name in "xwy"]
    batch = [np.array([[0.05, 1.0, -3.0]], np.float32)]
    artifact = from_qdq(model)
    found = executors(tmp_path / "foreign.onnx")
    for executor in found:
        assert set(executor.tensors(batch)) == {"x", "y"}
    (result,) = compare(found[0], found[1:], random_batches(model, 50), artifact, proof=certify(artifact))
    assert result.claim == "observed on 50 inputs"


def test_inspect_finds_every_scale_that_is_no_power_of_two(network):
    assert inspect(to_qdq(network)) == []
    artifact = residual_network()
    scale = np.array([1, 1, 0.75, 1, 1, 1, 1, 0.3] + [1] * 2, np.float32)
    bias = Encoding(scale, np.zeros(10, np.int64), artifact.encodings["fc.bias"].grid, 0)
    artifact.encodings["global.output"] = Encoding(np.float32(0.03), np.int64(0), encoding(0).grid)
    artifact.encodings["fc.bias"] = bias
    for tensor in artifact.model.graph.initializer:
        if tensor.name == "fc.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(scale * 3, "fc.bias"))
    assert inspect(to_qdq(artifact)) == [("fc.bias", 0.75), ("global.output", pytest.approx(0.03))]


def test_random_inputs_hold_ties_codes_and_values_beyond_the_range(network):
    batches = list(inputs(network, 70, seed=3))
    assert [[x.shape for x in batch] for batch in batches] == [[(n, 3, 12, 12)] for n in (32, 32, 6)]
    x = np.concatenate([batch[0] for batch in batches])
    grid = network.encodings["x"]
    codes = x.astype(np.float64) / grid.scale + grid.zero_point
    assert x.dtype == np.float32
    assert 0.3 < (codes % 1 == 0.5).mean() < 0.36
    assert 0.3 < (codes % 1 == 0).mean() < 0.36
    assert (codes < -10).mean() > 0.005
    assert (codes > 265).mean() > 0.005
    assert set(grid.quantize(x).ravel()) == set(range(256))
    again, other = (next(inputs(network, 70, seed=seed))[0] for seed in (3, 4))
    np.testing.assert_array_equal(again, batches[0][0])
    assert (other != again).any()


def test_random_inputs_of_a_fixed_batch_size_and_of_float_inputs():
    g = Graph()
    a, b = g.input("a", (2,), encoding(0)), g.input("b", (2,), None)
    model = to_qdq(g.artifact(g.node("Add", "add", [a, b], encoding(0))))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    batches = list(random_batches(model, 7))
    assert [[x.shape for x in batch] for batch in batches] == [[(7, 2), (7, 2)]]
    assert np.abs(batches[0][1]).max() < 6


def test_random_inputs_need_known_shapes(network):
    model = to_qdq(network)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(DataError, match="input x: only the first dimension may be free"):
        next(random_batches(model, 1))
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(DataError, match="input x: no random values for INT64"):
        next(random_batches(model, 1))


def test_what_onnxruntime_cannot_load_or_run_is_one_line_and_nothing_is_printed(network, tmp_path, capfd):
    path = tmp_path / "broken.onnx"
    model = to_qdq(network)
    model.graph.node[4].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    (batch,) = inputs(network, 1)
    with pytest.raises(FileFormatError, match=r"broken\.onnx: not a valid ONNX file: .*NoSuchOperator") as error:
        plain(path).run(batch)
    assert "\n" not in str(error.value)
    path.write_bytes(b"no protobuf")
    with pytest.raises(FileFormatError, match=r"broken\.onnx"):
        optimized(path).run(batch)
    with pytest.raises(FileFormatError, match="not a valid ONNX model"):
        plain(b"no protobuf").run(batch)
    executor = plain(to_qdq(network).SerializeToString())
    with pytest.raises(DataError, match="1 inputs are needed, 2 were given"):
        executor.run([*batch, *batch])
    with pytest.raises(DataError, match=r"onnxruntime cannot run the model: .*x"):
        executor.run([batch[0][:, :2]])
    assert capfd.readouterr() == ("", "")


def test_without_vnni_onnxruntime_is_asked_for_precision(monkeypatch):
    entry = "session.x64quantprecision"
    monkeypatch.setattr("pow2quant.validation.ort.lacks_vnni", lambda: True)
    assert options(optimized=True).get_session_config_entry(entry) == "1"
    monkeypatch.setattr("pow2quant.validation.ort.lacks_vnni", lambda: False)
    with pytest.raises(RuntimeError):
        options(optimized=True).get_session_config_entry(entry)
