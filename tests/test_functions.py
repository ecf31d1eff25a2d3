"""Functions with an integer definition, against exact arithmetic, on every executor, and what is proved of them."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pow2quant import QuantPlan, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import EncodingError, UnsupportedModelError
from pow2quant.frontends import modules as m
from pow2quant.functions import KEY, Lookup, Norm, Softmax, definition, mark
from pow2quant.graphs import GraphIndex
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.integer.run import run
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation import c99, ort
from pow2quant.validation.networks import Named, first_difference
from tests.backends import BACKENDS
from tests.prepared import Sketch, outcome
from tests.quantized_graphs import Graph, encoding

LEVELS = [
    getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    for level in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
]
CAUSAL = np.tril(np.ones((6, 6), bool))


def half_even(numerator: int, shift: int) -> int:
    """numerator / 2^shift, by Python's own rounding of fractions."""
    quotient, rest = divmod(numerator, 1 << shift)
    return quotient + (2 * rest > 1 << shift or (2 * rest == 1 << shift and quotient % 2 == 1))


def softmax_of(codes: list[int], kept: list[bool], defined: Softmax, k: int, out: int, highest: int) -> list[int]:
    """One row, in Python's integers; e^x is that of the C library."""
    largest = max(q for q, keep in zip(codes, kept, strict=True) if keep)
    step = math.ldexp(defined.factor, k)
    entries = [
        round(math.ldexp(math.exp(-(largest - q) * step), defined.table_bits)) if keep else 0
        for q, keep in zip(codes, kept, strict=True)
    ]
    reciprocal = 2**defined.reciprocal_bits // sum(entries)
    p = [e * reciprocal >> (defined.reciprocal_bits - 24) for e in entries]
    return [min(half_even(v, 24 + out), highest) for v in p]


def softmax_network(k, bits, out, defined, shape, width=None):
    g = Graph()
    x = g.input("x", shape, encoding(k, 0 if bits > 8 else 128, bits))
    axis = defined.axis
    g.node("Softmax", "s", [x], encoding(out, 0, width or min(16, -out)), axis=axis)
    artifact = g.artifact("s.output")
    mark(artifact.model.graph.node[0], defined)
    return artifact


def in_onnxruntime(artifact, real):
    """The results at every optimization level."""
    content = onnx_qdq.to_qdq(artifact).SerializeToString()
    found = []
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"x": real})[0])
    return found


def agreed_codes(artifact, codes):
    """The result's codes, on which onnxruntime at four levels, the engine and C agree."""
    x, y = artifact.encodings["x"], artifact.encodings[artifact.model.graph.output[0].name]
    real = x.dequantize(codes)
    (expected,) = run(lower(artifact), [codes])
    for result in in_onnxruntime(artifact, real):
        assert np.array_equal(y.quantize(result), expected)
    executor = c99.executor(lower(artifact))
    assert np.array_equal(executor.run([real])[0], y.dequantize(expected))
    return expected


SOFTMAXES = {
    "8 bits": (Softmax.of(-1, 9, 8), -5, 8, -8),
    "coarse logits": (Softmax.of(-1, 9, 8), -1, 8, -8),
    "another result grid": (Softmax.of(-1, 9, 8), -4, 8, -7),
    "a factor": (Softmax.of(-1, 9, 8, 0.1767767), -3, 8, -8),
    "16-bit result": (Softmax.of(-1, 9, 16), -5, 8, -16),
    "16-bit logits and result": (Softmax.of(-1, 9, 16), -11, 16, -16),
    "16-bit logits": (Softmax.of(-1, 9, 8), -12, 16, -8),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_is_its_definition_everywhere(name):
    defined, k, bits, out = SOFTMAXES[name]
    artifact = softmax_network(k, bits, out, defined, (9,))
    assert certify(artifact).proved
    rng = np.random.default_rng(0)
    codes = np.concatenate(
        [rng.integers(0, 2**bits, (1500, 9)), 2 ** (bits - 1) + rng.integers(0, 24, (1500, 9)) * 2 ** (bits - 8)]
    )
    codes[:9] = np.where(np.eye(9), 2**bits - 1, 0)
    codes = codes.astype(np.uint16 if bits > 8 else np.uint8)
    found = agreed_codes(artifact, codes)
    highest = 2 ** min(16, -out) - 1
    exact = [softmax_of(row, [True] * 9, defined, k, out, highest) for row in codes.tolist()]
    assert np.array_equal(found, exact)


@pytest.mark.parametrize(("axis", "shape"), [(-1, (2, 6, 6)), (-2, (2, 6, 6)), (-3, (5, 3, 2)), (-1, (4097,))])
def test_softmax_along_any_axis_and_in_long_rows(axis, shape):
    defined = Softmax.of(axis, shape[axis], 8)
    assert defined.is_single == (shape[axis] <= 4096)
    artifact = softmax_network(-4, 8, -8, defined, shape)
    assert certify(artifact).proved
    codes = np.random.default_rng(1).integers(0, 256, (5, *shape)).astype(np.uint8)
    found = agreed_codes(artifact, codes)
    rows = np.moveaxis(codes, axis, -1).reshape(-1, shape[axis]).tolist()
    exact = [softmax_of(row, [True] * len(row), defined, -4, -8, 255) for row in rows]
    assert np.array_equal(np.moveaxis(found, axis, -1).reshape(-1, shape[axis]), exact)


@pytest.mark.parametrize("keep", [CAUSAL, CAUSAL[None, None], np.array([[[[1, 0, 1, 1, 0, 1]]]], bool)])
def test_what_a_mask_takes_out_does_not_count(keep):
    defined = Softmax.of(-1, 6, 8, 0.5, keep)
    artifact = softmax_network(-4, 8, -8, defined, (2, 6, 6))
    assert certify(artifact).proved
    codes = np.random.default_rng(1).integers(0, 256, (40, 2, 6, 6)).astype(np.uint8)
    found = agreed_codes(artifact, codes)
    kept = np.broadcast_to(keep, codes.shape).reshape(-1, 6).tolist()
    rows = zip(codes.reshape(-1, 6).tolist(), kept, strict=True)
    assert np.array_equal(found.reshape(-1, 6), [softmax_of(q, k, defined, -4, -8, 255) for q, k in rows])
    assert not found[~np.broadcast_to(keep, codes.shape)].any()


@given(st.integers(1, 2**24))
def test_floors_of_quotients_are_exact_in_float32_and_float64(divisor):
    if divisor >= 2**12:
        assert np.floor(np.float32(2**24) / np.float32(divisor)) == 2**24 // divisor
    assert np.floor(np.float64(2**40) / np.float64(divisor)) == 2**40 // divisor


def test_every_floor_of_a_float32_quotient_just_below_an_integer():
    quotients = np.arange(1, 2**12 + 1)
    sums = np.unique(np.concatenate([2**24 // quotients, 2**24 // quotients + 1, 2**24 // quotients - 1]))
    sums = sums[(sums >= 2**12) & (sums <= 2**24)]
    assert np.array_equal(np.floor(np.float32(2**24) / sums.astype(np.float32)), 2**24 // sums)


def test_a_definition_is_read_back_from_the_file_and_only_where_the_nodes_are_its_own():
    artifact = softmax_network(-4, 8, -8, Softmax.of(-1, 6, 8), (6,))
    model = onnx_qdq.to_qdq(artifact)
    onnx.checker.check_model(model, full_check=True)
    back = onnx_qdq.from_qdq(model)
    assert list(back.model.graph.node) == list(artifact.model.graph.node)
    assert back.encodings == artifact.encodings
    assert certify(back).proved
    (table,) = [t for t in model.graph.initializer if onnx.numpy_helper.to_array(t).size > 50]
    values = onnx.numpy_helper.to_array(table).copy()
    values[3] += 1
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    changed = onnx_qdq.from_qdq(model)
    assert not certify(changed).proved
    assert all(definition(node) is None for node in changed.model.graph.node)


def test_definitions_beyond_the_conditions_are_not_proved():
    good = Softmax.of(-1, 6, 8)
    for wrong in (replace(good, table_bits=23), replace(good, reciprocal_bits=50), replace(good, factor=-1.0)):
        assert not certify(softmax_network(-4, 8, -8, wrong, (6,))).proved
    nothing = Softmax.of(-1, 6, 8, 1.0, np.zeros(6, bool))
    assert "all values of a row" in certify(softmax_network(-4, 8, -8, nothing, (6,))).layers[0].reason
    unknown = softmax_network(-4, 8, -8, good, (6,))
    unknown.model.graph.node[0].metadata_props[0].value = '{"function": "other"}'
    assert unknown.model.graph.node[0].metadata_props[0].key == KEY
    assert not certify(unknown).proved


def test_two_networks_with_other_integers_are_not_the_same():
    first, second = (softmax_network(-4, 8, -8, Softmax.of(-1, 6, bits), (6,)) for bits in (8, 16))
    assert first_difference(Named("a", first), Named("b", first)) is None
    assert "means other integers in a than in b" in first_difference(Named("a", first), Named("b", second))


def attention():
    """Logits of a layer, and their softmax."""
    sketch = Sketch("x")
    return sketch.network(
        sketch("s", m.Softmax(-1), sketch("front", nn.Linear(8, 6), *sketch.inputs)), torch.randn(2, 8)
    )


def test_the_plain_node_stays_available_and_is_observed(tmp_path):
    torch.manual_seed(0)
    batches = [torch.randn(64, 8) for _ in range(3)]
    plan = replace(QuantPlan.default(), functions="plain")
    sim = simulate(attention(), batches[0], plan)
    sim.calibrate(batches[:2])
    artifact = sim.export(batches[0])
    assert not certify(artifact).proved
    assert "Softmax" in [node.op_type for node in onnx_qdq.to_qdq(artifact).graph.node]
    executor = simulation_executor(sim, "custom", torch.device("cpu"))
    path = onnx_qdq.export_qdq(artifact, tmp_path)
    expected = executor.run([batches[2].numpy()])[0]
    assert all(np.array_equal(e.run([batches[2].numpy()])[0], expected) for e in ort.executors(path))


@pytest.mark.parametrize("bits", [8, 16])
def test_what_overflows_beyond_the_values_that_were_seen_saturates(bits, tmp_path):
    sketch = Sketch("x")
    network = sketch.network(sketch("e", m.Exp(), *sketch.inputs), torch.zeros(2, 4))
    seen, beyond = torch.tensor([[80.0, -3.0, 1.0, 70.0]]), np.array([[127, 100, 89, 0]], np.float32)
    sim = simulate(network, seen, QuantPlan.default(bits, bits))
    sim.calibrate([seen])
    expected = sim.model(torch.from_numpy(beyond)).detach().numpy()
    assert expected[0, 0] == expected[0, 2] == sim.encodings()["e.output"].maximum
    path = onnx_qdq.export_qdq(sim.export(seen), tmp_path)
    executors = [*ort.executors(path), c99.executor(lower(sim.export(seen)))]
    assert all(np.array_equal(e.run([beyond])[0], expected) for e in executors)
    with pytest.raises(EncodingError, match=r"^x: NaN and infinity cannot be quantized"):
        executors[-1].run([beyond * np.nan])


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_simulate_the_integers(backend):
    torch.manual_seed(0)
    batches = [torch.randn(64, 8) * 3 for _ in range(2)]
    sim = simulate(attention(), batches[0], QuantPlan.default(), backend=backend)
    float_result = sim.model(batches[0])
    sim.calibrate(batches)
    executor = simulation_executor(sim, backend, torch.device("cpu"))
    artifact = sim.export(batches[0])
    x = torch.randn(4000, 8).numpy() * 3
    expected = executor.run([x])[0]
    assert certify(artifact).proved
    assert all(np.array_equal(result, expected) for result in in_onnxruntime(artifact, x))
    with sim.intercept(lambda site, x, quantized: x):  # a float run is the float network
        assert torch.equal(sim.model(batches[0]), float_result)


def test_the_gradient_is_that_of_the_float_function():
    layer, plain = m.Softmax(-1), nn.Softmax(-1)
    quantizer = type("Quantizer", (), {"encoding": encoding(-4, 128)})()
    layer.connect(quantizer, quantizer)
    x = (torch.randint(0, 100, (5, 6)) / 16).requires_grad_()
    layer(x)[:, 0].sum().backward()
    y = x.detach().clone().requires_grad_()
    plain(y)[:, 0].sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)
    assert not torch.equal(layer(x), plain(x))


def test_attention_with_masks_is_proved(tmp_path):
    torch.manual_seed(0)
    sketch = Sketch("x")
    transposed = sketch("front", nn.Conv1d(8, 8, 1), *sketch.inputs)
    x = sketch("t", m.Permute((0, 2, 1)), transposed)
    scores = sketch("qk", m.MatMul(), x, transposed)
    mask = torch.where(torch.from_numpy(CAUSAL), 0.0, -torch.inf)
    weights = sketch("s", m.MaskedSoftmax(-1, 8**-0.5, mask), scores)
    network = sketch.network(sketch("av", m.MatMul(), weights, x), torch.randn(2, 8, 6))
    found = outcome(network, [(torch.randn(40, 8, 6),) for _ in range(3)], tmp_path)
    assert found.pop("proved")
    assert len(found) == 4
    assert set(found.values()) == {0}


def half_up(numerator: int, shift: int) -> int:
    return (numerator + (1 << shift >> 1)) >> shift


def norm_of(q: list[int], defined: Norm, where: int, f: int, e: int) -> list[int]:
    """One row in Python's integers, in units of 2^-fine. where: of its first value among gammas and betas."""
    n, total = len(q), sum(q) if defined.centered else 0
    spread = max(1, n * sum(v * v for v in q) - total * total + e)
    reciprocal = 2**40 // math.isqrt(spread * 4**f)
    z = [half_up((n * v - total) * reciprocal, 40 - f - 16) for v in q]
    channels = [(where + i) // defined.inner for i in range(n)]
    return [half_up(v * defined.gamma[c] + defined.beta[c], defined.drop) for v, c in zip(z, channels, strict=True)]


def norm_network(defined, shape, source, target):
    g = Graph()
    g.input("x", shape, source)
    g.node("Exp", "n", ["x"], target)  # whatever stands here means the definition
    artifact = g.artifact("n.output")
    mark(artifact.model.graph.node[0], defined)
    return artifact


def factors(count):
    rng = np.random.default_rng(count)
    return rng.normal(1, 1, count).astype(np.float32), rng.normal(0, 2, count).astype(np.float32)


NORMS = {
    "layer": (Norm.of((24,), 0, True, 1e-5, *factors(24)), (3, 24), encoding(-4, 118), encoding(-5, 128)),
    "layer, two dimensions": (
        Norm.of((4, 6), 0, True, 1e-5, *factors(24)),
        (4, 6),
        encoding(-6, 0, 8, True),
        encoding(-4, 128),
    ),
    "layer, 16 bits": (
        Norm.of((24,), 0, True, 1e-6, *factors(24)),
        (2, 24),
        encoding(-11, 2**15 - 80, 16),
        encoding(-12, 2**15, 16),
    ),
    "rms": (Norm.of((24,), 0, False, 1e-6, *factors(24)), (3, 24), encoding(-4, 118), encoding(-5, 128)),
    "group": (Norm.of((6, 2, 3), 3, True, 1e-5, *factors(6)), (6, 2, 3), encoding(-4, 118), encoding(-5, 128)),
    "instance": (Norm.of((6, 2, 3), 6, True, 1e-5, *factors(6)), (6, 2, 3), encoding(3, 0), encoding(-5, 128)),
    "a coarse grid and a large epsilon": (
        Norm.of((24,), 0, True, 0.5, *factors(24)),
        (24,),
        encoding(-9, 128),
        encoding(-8, 128),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_its_definition_everywhere(name):
    defined, shape, source, target = NORMS[name]
    artifact = norm_network(defined, shape, source, target)
    assert certify(artifact).proved, certify(artifact).layers[0].reason
    rng, n = np.random.default_rng(0), defined.length
    low, high, zero = int(source.grid.qmin), int(source.grid.qmax), int(source.zero_point)
    rows = rng.integers(low, high + 1, (300, *shape))
    narrow = np.clip(rng.integers(low, high + 1, (100, *shape)) // 16 + zero, low, high)
    codes = np.concatenate([rows, narrow, np.full((1, *shape), high), np.full((1, *shape), zero)])
    found = agreed_codes(artifact, codes.astype(np.int8 if low < 0 else np.uint16 if high > 255 else np.uint8))
    f, e = defined.precision(source), defined.epsilon(source)
    per_sample = math.prod(shape) if defined.groups else n
    values = (codes - zero).reshape(-1, n).tolist()
    exact = [norm_of(row, defined, i * n % per_sample, f, e) for i, row in enumerate(values)]
    shift = int(target.exponent) + defined.fine
    expected = [half_even(v, shift) if shift >= 0 else v << -shift for row in exact for v in row]
    clipped = np.clip(np.array(expected) + int(target.zero_point), int(target.grid.qmin), int(target.grid.qmax))
    assert np.array_equal(found.reshape(-1), clipped)


@pytest.mark.parametrize("bits", [8, 16])
def test_norms_are_close_to_the_real_ones(bits):
    rng = np.random.default_rng(0)
    x = encoding(-4, 128) if bits == 8 else encoding(-11, 2**15, 16)
    gamma, beta = factors(192)
    defined = Norm.of((192,), 0, True, float(np.float32(1e-5)), gamma, beta)
    layer = m.LayerNorm(192)
    layer.weight.data, layer.bias.data = torch.from_numpy(gamma), torch.from_numpy(beta)
    real = torch.from_numpy(x.fake_quantize(rng.normal(0, 2, (500, 192)).astype(np.float32)))
    quantizer = type("Quantizer", (), {"encoding": x})()
    layer.connect(quantizer, quantizer)
    with torch.no_grad():
        assert layer.definition((500, 192), x, bits) == defined
        assert float((layer(real) - layer.plain(real)).abs().max()) < 3e-4
        assert not torch.equal(layer(real), layer.plain(real))


def test_norms_beyond_the_conditions_are_not_proved():
    gamma, beta = factors(4096)
    wide = Norm.of((4096,), 0, True, 1e-5, gamma, beta)
    assert "2^53" in certify(norm_network(wide, (4096,), encoding(-8, 2**15, 16), encoding(-4))).layers[0].reason
    other = replace(wide, shape=(2048,), gamma=wide.gamma[:2048], beta=wide.beta[:2048])
    assert "of shape" in certify(norm_network(other, (4096,), encoding(-8), encoding(-4))).layers[0].reason
    assert Norm.of((4,), 0, True, 1e-5, np.float32([1, np.inf, 1, 1]), np.zeros(4, np.float32)) is None


def activation(module, width=6):
    sketch = Sketch("x")
    return sketch.network(sketch("f", module, sketch("front", nn.Linear(8, width), *sketch.inputs)), torch.randn(2, 8))


FUNCTIONS = [m.GELU(), m.SiLU(), m.Tanh(), m.Exp(0.5), m.LeakyReLU(0.1), m.Hardsigmoid(), m.Compare("Greater", 0.1)]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("module", FUNCTIONS, ids=lambda f: type(f).__name__)
def test_a_function_is_one_table_everywhere(module, bits, tmp_path):
    torch.manual_seed(0)
    batches = [(torch.randn(n, 8),) for n in (2, 64, 512)]
    sim = simulate(activation(module), batches[0], QuantPlan.default(activation_bits=bits))
    sim.calibrate(batches[:-1])
    artifact = sim.export(batches[0])
    (node,) = [n for n in artifact.model.graph.node if definition(n)]
    x, y = artifact.encodings["front.output"], artifact.encodings["f.output"]
    assert definition(node).fits(x, y)
    (layer,) = [layer for layer in certify(artifact).layers if layer.node == "f"]
    assert layer.proved
    codes = np.arange(int(x.grid.qmin), int(x.grid.qmax) + 1)
    assert np.array_equal(definition(node).results(), y.quantize(module.plain(torch.from_numpy(x.dequantize(codes)))))
    found = outcome(activation(module), batches, tmp_path, bits)
    assert {value for name, value in found.items() if name != "proved"} == {0}


def table_network(values, x=None, y=None):
    x, y = x or encoding(-4, 128), y or encoding(-3, 100)
    g = Graph()
    g.node("Tanh", "t", [g.input("x", (3,), x)], y)
    artifact = g.artifact("t.output")
    mark(artifact.model.graph.node[0], Lookup.of(encoding(-4, 128), encoding(-3, 100), values, HALF_EVEN))
    return artifact


def test_a_table_holds_whatever_it_says():
    values = np.random.default_rng(0).normal(0, 5, 256).astype(np.float32)
    artifact = table_network(values)
    assert certify(artifact).proved
    codes = np.arange(256, dtype=np.uint8)[:255].reshape(-1, 3)
    found = agreed_codes(artifact, codes)
    assert np.array_equal(found, encoding(-3, 100).quantize(values)[codes])
    back = onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact))
    assert list(back.model.graph.node) == list(artifact.model.graph.node)


@pytest.mark.parametrize("change", [{"x": encoding(-5, 128)}, {"y": encoding(-3, 102)}, {"x": encoding(-4, 8, 4)}])
def test_a_table_between_other_encodings_is_not_used(change):
    values = np.zeros(256, np.float32)
    artifact = table_network(values, **change)
    assert not certify(artifact).proved
    assert "Gather" not in [n.op_type for n in onnx_qdq.to_qdq(artifact).graph.node]
    with pytest.raises(UnsupportedModelError, match="other encodings"):
        lower(artifact)


@pytest.mark.parametrize("codes", ["", "AA==", "!"])
def test_a_table_that_is_no_table_is_not_used(codes):
    artifact = table_network(np.zeros(256, np.float32))
    entry = artifact.model.graph.node[0].metadata_props[0]
    entry.value = json.dumps(json.loads(entry.value) | {"codes": codes})
    assert not certify(artifact).proved


def test_all_definitions_of_a_file_are_read_at_once(monkeypatch):
    """However many there are, its graph is searched once, not once for each."""
    network = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(3, 3), nn.Sigmoid())])
    x = torch.rand(4, 3)
    sim = simulate(network, x, QuantPlan.default(activation_bits=16), backend="custom")
    sim.calibrate([x])
    model = onnx_qdq.to_qdq(sim.export(x))
    searched = []
    monkeypatch.setattr(onnx_qdq.exact, "GraphIndex", lambda graph: searched.append(graph) or GraphIndex(graph))
    read = onnx_qdq.from_qdq(model)
    assert [n.op_type for n in read.model.graph.node].count("Sigmoid") == 6
    assert len(searched) == 1


CODES = torch.randint(-128, 128, (6, 4, 5, 7), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize(
    ("layer", "operands"),
    [
        (m.GELU(), ()),
        (m.LayerNorm((5, 7)), ()),
        (m.GroupNorm(2, 4), ()),
        (m.Softmax(2), ()),
        (m.MaskedSoftmax(-1, mask=torch.zeros(6, 4, 5, 7)), ()),
        (m.MaskedSoftmax(-1, asks=True), (CODES[:, :1] > 0,)),
        (m.MaskedSoftmax(-1, asks=True), (CODES[:1] > 0,)),
        (m.MaskedSoftmax(-1, asks=True), (CODES[0, :1] > 0,)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("size", [1, 150, 300, 1 << 30])
def test_pieces_are_those_of_the_whole(layer, operands, size, monkeypatch):
    ends = encoding(-4, 128), encoding(-5, 128)
    layer.connect(*(type("Quantizer", (), {"encoding": end})() for end in ends))
    x = CODES / 16
    monkeypatch.setattr("pow2quant.frontends.modules.exact.PIECE", size)
    with torch.no_grad():
        defined = layer.definition(tuple(x.shape), *ends)
        expected = layer.integers(x.double() * 16, defined, ends[0], *operands).float()
        assert torch.equal(layer(x, *operands), expected)
        assert layer(x[:0], *(y[:0] if len(y) == len(x) else y for y in operands)).shape == (0, 4, 5, 7)
