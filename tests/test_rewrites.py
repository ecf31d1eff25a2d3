"""What onnxruntime's optimizers, extreme scales and tampered files do to a proof."""

import re
import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest

from pow2quant import compiled
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import UnsupportedModelError
from pow2quant.integer import run as engine
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.rewrites import REWRITES
from pow2quant.validation import c99, ort
from pow2quant.validation import engine as engine_executor
from pow2quant.validation.agreement import compare
from tests.quantized_graphs import Graph, encoding

A, B = encoding(-5, 128), encoding(-4, 0)


def _differing(artifact):
    model = onnx_qdq.to_qdq(artifact)
    batch = next(ort.random_batches(model, 16, 0))
    plain, optimized = (make(model).run(batch)[0] for make in (ort.plain, ort.optimized))
    return int((plain != optimized).sum())


def _foreign(kinds):
    """Q-DQ, nodes that do nothing together, and Q-DQ of another encoding, as another tool writes it."""
    model = onnx_qdq.to_qdq(_requantized(kinds))
    onnx_qdq.guards.take(model.graph)
    del model.metadata_props[:]
    return model


def _requantized(kinds, first=A, second=B):
    g = Graph()
    x = g.input("x", (2, 5, 5), first)
    for i, kind in enumerate(kinds):
        op, constant, attributes = {
            "add": ("Add", np.float32(0), {}),
            "subtract": ("Sub", np.float32(0), {}),
            "multiply": ("Mul", np.float32(1), {}),
            "expand": ("Expand", np.array([1, 1, 1, 1]), {}),
            "identity": ("Identity", None, {}),
            "dropout": ("Dropout", None, {}),
            "there": ("Transpose", None, {"perm": [0, 2, 3, 1]}),
            "back": ("Transpose", None, {"perm": [0, 3, 1, 2]}),
        }[kind]
        inputs = [x] if constant is None else [x, g.constant(f"c{i}", constant)]
        x = g.node(op, f"n{i}", inputs, second if i == len(kinds) - 1 else None, **attributes)
    return g.artifact(x)


IDLE = [
    ["identity"],
    ["dropout"],
    ["add"],
    ["subtract"],
    ["multiply"],
    ["expand"],
    ["there", "back"],
    ["add", "identity"],
]


@pytest.mark.parametrize("kinds", IDLE, ids="-".join)
def test_a_second_encoding_behind_nothing_survives_optimization_and_is_not_proved(kinds):
    artifact = _requantized(kinds)
    assert _differing(artifact) == 0
    certificate = certify(artifact)
    assert not certificate.proved
    assert "DoubleQDQPairsRemover" in certificate.layers[-1].reason
    back = onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact))
    assert back.model.graph.node == artifact.model.graph.node
    assert back.encodings.keys() == artifact.encodings.keys()


@pytest.mark.parametrize("kinds", IDLE, ids="-".join)
def test_a_foreign_file_with_that_pattern_differs_and_is_refused(kinds):
    model = _foreign(kinds)
    batch = next(ort.random_batches(model, 16, 0))
    assert (ort.plain(model).run(batch)[0] != ort.optimized(model).run(batch)[0]).any()
    assert not certify(onnx_qdq.from_qdq(model)).proved


def test_one_encoding_and_other_storage_stay_proved():
    for second in (A, encoding(-9, 2**15, 16), encoding(-4, 0, 8, True)):
        artifact = _requantized(["identity"], A, second)
        assert certify(artifact).proved
        assert _differing(artifact) == 0


def test_a_float_pad_in_front_of_a_maximum_is_kept_apart_and_not_proved():
    g = Graph()
    x = g.input("x", (2, 6, 6), encoding(-4, 0, 8, True))
    pad = g.node("Pad", "pad", [x, g.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))])
    artifact = g.artifact(g.node("MaxPool", "max", [pad], encoding(-4, 128), kernel_shape=[2, 2], strides=[2, 2]))
    assert _differing(artifact) == 0
    assert "Pad_Fusion" in certify(artifact).layers[0].reason
    assert onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact)).model.graph.node == artifact.model.graph.node


def _given_and_rounded(moves, given):
    """A float sum, moved on, and rounded in the end; what stands in front of move `given` is an output too."""
    g = Graph()
    x = asked = g.node("Max", "float", [g.input("x", (4, 4, 4), encoding(-4, 128))] * 2)
    for i, op in enumerate(moves):
        asked = x if i <= given else asked
        constants = {"Expand": np.ones(4, np.int64), "Add": np.float32(0)}
        inputs = [x, g.constant(f"c{i}", constants[op])] if op in constants else [x]
        attributes = {"Transpose": {"perm": [0, 2, 1, 3]}, "MaxPool": {"kernel_shape": [1, 1]}}.get(op, {})
        x = g.node(op, f"n{i}", inputs, encoding(-1, 3) if i == len(moves) - 1 else None, **attributes)
    return g.artifact(asked, x)


@pytest.mark.parametrize(
    ("moves", "given"),
    [
        (["Transpose"], 0),
        (["Transpose", "MaxPool"], 0),
        (["Identity", "Transpose"], 1),
        (["Add", "Transpose"], 0),
        (["Expand", "Transpose", "Expand"], 0),
        (["MaxPool", "Transpose", "Identity"], 1),
    ],
    ids=str,
)
def test_a_float_output_that_is_transposed_and_rounded_stays_float_and_is_not_proved(moves, given):
    artifact = _given_and_rounded(moves, given)
    assert any("TransposeOptimizer" in layer.reason for layer in certify(artifact).layers)
    model = onnx_qdq.to_qdq(artifact)
    batch = next(ort.random_batches(model, 16, 0))
    for plain, optimized in zip(ort.plain(model).run(batch), ort.optimized(model).run(batch), strict=True):
        assert np.array_equal(plain, optimized)
    assert onnx_qdq.from_qdq(model).model.graph.node == artifact.model.graph.node
    onnx_qdq.guards.take(model.graph)  # as another tool writes it
    plain, optimized = (make(model).run(batch)[0] for make in (ort.plain, ort.optimized))
    assert (plain != optimized).any()


def test_a_float_output_that_is_rounded_without_a_transpose_stays_proved():
    artifact = _given_and_rounded(["MaxPool", "Identity"], 1)
    assert certify(artifact).proved
    assert _differing(artifact) == 0


@pytest.mark.parametrize("op", ["MaxPool", "Transpose"])
@pytest.mark.parametrize("bits", [6, 10])
def test_an_int8_tensor_that_is_moved_to_a_narrower_grid_loads_with_optimizations(op, bits):
    g = Graph()
    attributes = {"kernel_shape": [2, 2]} if op == "MaxPool" else {"perm": [0, 2, 1, 3]}
    x = g.input("x", (4, 4, 4), encoding(-4, 2, 8, True))
    artifact = g.artifact(g.node(op, "moved", [x], encoding(-6, 4, bits, True), **attributes))
    assert _differing(artifact) == 0
    assert onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact)).model.graph.node == artifact.model.graph.node


@pytest.mark.parametrize("op", ["Add", "Mul", "AveragePool"])
@pytest.mark.parametrize("between", ["Transpose", "Identity", "Add"])
def test_a_float_result_that_is_passed_on_before_it_is_rounded_is_not_proved(op, between):
    g = Graph()
    x = g.input("x", (2, 4, 4), encoding(2, 202))
    computed = (
        g.node(op, "computed", [x], kernel_shape=[2, 2]) if op == "AveragePool" else g.node(op, "computed", [x, x])
    )
    inputs = [computed, g.constant("zero", np.float32(0))] if between == "Add" else [computed]
    attributes = {"perm": [0, 1, 3, 2]} if between == "Transpose" else {}
    artifact = g.artifact(g.node(between, "between", inputs, encoding(11, 165), **attributes))
    assert f"is passed on by {between} before it is rounded" in certify(artifact).layers[0].reason


def test_a_moved_value_that_saturates_beyond_int32_is_not_proved():
    artifact = _requantized(["identity"], encoding(-6, 40, 8, True), encoding(-45, -2, 16, True))
    assert "before it saturates" in certify(artifact).layers[0].reason


@pytest.mark.parametrize(("k_in", "k_out"), [(0, -40), (0, -56), (0, -64), (20, -126), (31, -32)])
@pytest.mark.parametrize("op", ["Gemm", "Add", "ReduceMean"])
def test_no_requantization_beyond_int32_is_proved_and_the_engine_never_wraps(op, k_in, k_out):
    g = Graph()
    x = g.input("x", (4,), encoding(k_in))
    result = encoding(k_out, 128)
    if op == "Gemm":
        y = g.layer("Gemm", "n", x, np.array([[1, 0, 0, 0], [0, 64, 0, 0]]), None, result, k=0, transB=1)
    elif op == "Add":
        y = g.node("Add", "n", [x, x], result)
    else:
        y = g.node("ReduceMean", "n", [x, g.constant("axes", np.array([1]))], result, keepdims=1)
    artifact = g.artifact(y)
    assert not certify(artifact).proved
    codes = np.array([[1, 2, 3, 4], [255, 255, 255, 255], [0, 0, 0, 0]], np.uint8)
    try:
        program = lower(artifact)
    except UnsupportedModelError:  # refused: it would wrap
        assert k_in - k_out > 40
        return
    assert (engine.run(program, [codes])[0] >= 128).all()


def _difference(swapped=False, bias=5):
    g = Graph()
    x = g.input("x", (2, 4, 4), encoding(-4, 128))
    a = g.layer("Conv", "a", x, np.full((2, 2, 1, 1), 3), [bias, -5], encoding(-4, 128), k=-3)
    b = g.layer("Conv", "b", x, np.full((2, 2, 1, 1), -2), [1, 2], encoding(-4, 128), k=-3)
    return g.artifact(g.node("Sub", "sub", [b, a] if swapped else [a, b], encoding(-3, 128)))


@pytest.mark.parametrize(
    ("other", "note"), [(_difference(swapped=True), "operand 1 of sub"), (_difference(bias=6), "a.bias")]
)
def test_no_executor_is_proved_on_another_file(tmp_path: Path, other, note):
    certified = _difference()
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx_qdq.save(onnx_qdq.to_qdq(certified), good)
    onnx_qdq.save(onnx_qdq.to_qdq(other), bad)
    executors = [ort.optimized(bad), *engine_executor.executors(bad)]
    executors += [] if compiled.unavailable() else c99.executors(bad)
    zeros = [[np.zeros((4, 2, 4, 4), np.float32)]]
    for agreement in compare(ort.plain(good), executors, zeros, certified, proof=certify(certified)):
        assert agreement.claim != "proved"
        assert any(note in text for text in agreement.notes)


def test_normalizations_in_a_row_are_valid_and_agree():
    rng = np.random.default_rng(0)
    g = Graph()
    x = g.input("x", (4, 8), encoding(-5, 128))
    gamma = g.constant("gamma", rng.uniform(0.5, 2, 8).astype(np.float32))
    beta = g.constant("beta", rng.uniform(-1, 1, 8).astype(np.float32))
    a = g.node("LayerNormalization", "a", [x, gamma, beta], encoding(-5, 128))
    b = g.node("LayerNormalization", "b", [a, gamma, beta], encoding(-5, 128))
    c = g.node("LayerNormalization", "c", [b, gamma, beta], encoding(-5, 128))
    artifact = g.artifact(g.node("Add", "add", [a, c], encoding(-4, 128)))
    onnx.checker.check_model(onnx_qdq.to_qdq(artifact), full_check=True)
    assert _differing(artifact) == 0
    back = onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact))
    assert back.model.graph.node == artifact.model.graph.node
    assert back.encodings.keys() == artifact.encodings.keys()


def test_every_pair_of_softmax_codes_agrees_and_is_observed_only():
    g = Graph()
    x = g.input("x", (2,), encoding(-7, 128))
    artifact = g.artifact(g.node("Softmax", "s", [x], encoding(-8), axis=-1))
    assert not certify(artifact).proved
    codes = (np.stack(np.meshgrid(*[np.arange(-128, 128)] * 2), -1).reshape(-1, 2) / 128).astype(np.float32)
    model = onnx_qdq.to_qdq(artifact)
    plain, optimized = (make(model).run([codes])[0] for make in (ort.plain, ort.optimized))
    assert np.array_equal(plain, optimized)
    exact = 1 / (1 + np.exp(codes[:, ::-1].astype(np.float64) - codes))
    assert np.array_equal(plain, np.clip(np.rint(exact * 256), 0, 255) / 256)


def test_the_documentation_lists_every_rewrite():
    docs = Path(__file__).parents[1] / "docs"
    assert "<!-- generated: rewrites -->" in (docs / "numerics.md").read_text(encoding="utf-8")
    rows = runpy.run_path(str(docs / "hooks.py"))["rewrites"]().splitlines()
    for rewrite in REWRITES:
        assert any(f"`{rewrite.name}`" in row and f" | {rewrite.level} | " in row for row in rows)
    assert len({rewrite.name for rewrite in REWRITES}) == len(REWRITES)


def test_the_range_of_onnxruntime_is_the_one_that_the_documentation_measured():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "numerics.md").read_text(encoding="utf-8").partition("## Versions of onnxruntime")[2]
    tried = [tuple(map(int, v.split("."))) for v in re.findall(r"^\| (1\.\d+\.\d+) \|", page, re.MULTILINE)]
    oldest, newest = re.findall(
        r'"onnxruntime>=(\d+\.\d+),<(\d+\.\d+)"', (root / "pyproject.toml").read_text(encoding="utf-8")
    )[0]
    assert tried == sorted(tried)
    assert len(tried) >= 4
    assert oldest == f"{tried[0][0]}.{tried[0][1]}"
    assert newest == f"{tried[-1][0]}.{tried[-1][1] + 1}"
