"""Networks and executors that are broken on purpose: the verdict names the node and the cause."""

import json
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pow2quant.adapters import aimet_encodings
from pow2quant.adapters.onnx_qdq import export_qdq, save, to_qdq
from pow2quant.integer.lower import lower
from pow2quant.integer.program import Requantization
from pow2quant.pow2_constraints import Encoding
from pow2quant.validation import engine, ort
from pow2quant.validation.agreement import Executor, compare
from tests.quantized_graphs import Graph, encoding, residual_network

plain, optimized = ort.plain, ort.optimized


def verdict(artifact, reference, other, samples=64):
    (result,) = compare(reference, [other], ort.random_batches(to_qdq(artifact), samples), artifact)
    assert result.claim == "differs"
    return result


def found(artifact, reference, other, samples=64):
    """The node at which two executors part, and the cause."""
    divergence = verdict(artifact, reference, other, samples).first_diverging
    return divergence.node, divergence.cause


def set_constant(artifact, name, change):
    (tensor,) = (t for t in artifact.model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(numpy_helper.to_array(tensor).copy())), name))


def set_encoding(artifact, name, scale=lambda s: s, zero_point=lambda z: z):
    e = artifact.encodings[name]
    artifact.encodings[name] = Encoding(scale(e.scale), zero_point(e.zero_point), e.grid, e.axis)


def next_up(scale):
    return np.nextafter(scale, np.float32(np.inf))


@pytest.fixture(scope="module")
def network():
    return residual_network()


def altered(artifact, node, change, **fields):
    """The engine, one of its steps replaced; like a C program, it has no file of its own."""
    program = lower(artifact)
    steps = tuple(replace(s, **change(s)) if s.node == node else s for s in program.steps)
    assert any(a is not b for a, b in zip(steps, program.steps, strict=True))
    return engine.executor(replace(program, steps=steps), "altered engine")


# Ten files that are broken, one after the other


def test_an_odd_zero_point_behind_an_addition():
    artifact = residual_network(add_zero_point=1)
    model = to_qdq(artifact)
    node, cause = found(artifact, plain(model), optimized(model))
    assert node == "residual"
    assert cause == (
        "the exact result lies halfway between two codes in all 257 differing elements, and the zero point 101 is odd: "
        "onnxruntime, all optimizations adds it before rounding half to even; without graph optimizations the same "
        "file is right"
    )
    assert found(artifact, engine.executor(lower(artifact)), optimized(model)) == (node, cause)


def test_float_biases_that_onnxruntime_quantizes_by_itself():
    artifact = residual_network()
    for name in [name for name in artifact.encodings if name.endswith(".bias")]:
        del artifact.encodings[name]
        set_constant(artifact, name, lambda bias: bias * np.float32(1.37))
    model = to_qdq(artifact)
    node, cause = found(artifact, plain(model), optimized(model), 300)
    assert node == "project"
    assert "one constant per channel explains all" in cause
    assert "bias project.bias has no encoding" in cause
    assert cause.endswith("; without graph optimizations the same file is right")


def test_a_scale_that_is_off_by_one_ulp():
    artifact = residual_network()
    set_encoding(artifact, "residual.output", scale=next_up)
    model = to_qdq(artifact)
    node, cause = found(artifact, plain(model), optimized(model))
    assert node == "residual"
    assert "the rounding of float32 explains all" in cause
    assert "residual.output: scale 0.125000015 is not a power of two" in cause


def test_a_scale_that_is_off_by_one_ulp_in_one_file(network):
    artifact = residual_network()
    set_encoding(artifact, "stem_relu.output", scale=next_up)
    node, cause = found(network, plain(to_qdq(network)), optimized(to_qdq(artifact)))
    assert node == "stem_relu"
    assert cause == (
        "the executors' files hold different networks: the scale of stem_relu.output is 0.015625 in onnxruntime, no "
        "optimization and 0.0156250019 in onnxruntime, all optimizations"
    )


def test_a_bias_with_a_wrong_exponent_in_one_file(network):
    artifact = residual_network()
    set_encoding(artifact, "project.bias", scale=lambda s: 2 * s)
    set_constant(artifact, "project.bias", lambda bias: 2 * bias)
    node, cause = found(network, plain(to_qdq(network)), plain(to_qdq(artifact)))
    assert node == "project"
    assert "different networks: the scale of project.bias[0] is 0.001953125 in" in cause
    assert "(8 of 8 values)" in cause


def test_a_weight_that_is_not_the_same_in_both_files(network):
    artifact = residual_network()
    weight = artifact.encodings["depthwise.weight"]

    def change(values):
        values[3, 0, 1, 1] += weight.scale[3]
        return values

    set_constant(artifact, "depthwise.weight", change)
    node, cause = found(network, plain(to_qdq(network)), optimized(to_qdq(artifact)))
    assert node == "relu6"
    assert "different networks: depthwise.weight[3, 0, 1, 1] is " in cause
    assert cause.endswith("(1 of 72 values)")


def test_a_clip_whose_end_is_not_the_same_in_both_files(network):
    artifact = residual_network()
    set_constant(artifact, "relu6.max", lambda end: np.float32(1))
    node, cause = found(network, plain(to_qdq(network)), optimized(to_qdq(artifact)))
    assert node == "relu6"
    assert "different networks: relu6.max is 6 in onnxruntime, no optimization and 1 in onnxruntime, all" in cause


def test_a_zero_point_that_is_off_by_one_in_the_encodings_file(network, tmp_path):
    export_qdq(network, tmp_path)
    save(network.model, tmp_path / "model_float.onnx")
    aimet_encodings.export_1_0_0(network, tmp_path)
    file = tmp_path / "model.encodings"
    document = json.loads(file.read_text())
    (entry,) = (e for e in document["activation_encodings"] if e["name"] == "x")
    entry["offset"] = [z - 1 for z in entry["offset"]]
    file.write_text(json.dumps(document))
    first, _, rebuilt, _ = ort.executors(tmp_path / "model.onnx", (tmp_path / "model_float.onnx", file))
    node, cause = found(network, first, rebuilt)
    assert node == ""
    assert cause == (
        "the graph input is quantized differently: the executors' files hold different networks: the zero point of x "
        "is 128 in onnxruntime, no optimization and 129 in onnxruntime, no optimization, from model_float.onnx + "
        "model.encodings"
    )


def test_what_is_proved_of_one_network_is_not_claimed_of_another(network):
    artifact = residual_network()
    set_encoding(artifact, "stem_relu.output", zero_point=lambda z: z + 2)  # seen where it saturates only
    mine, other = plain(to_qdq(network)), plain(to_qdq(artifact))
    batch = [np.zeros((1, 3, 12, 12), np.float32)]
    (same,) = compare(mine, [optimized(to_qdq(network))], [batch], network, proof=True)
    (result,) = compare(mine, [other], [batch], network, proof=True)
    assert (same.differing, same.claim, same.notes) == (0, "proved", ())
    assert (result.differing, result.claim) == (0, "observed on 1 inputs")
    assert result.notes == (
        "the file of onnxruntime, no optimization holds another network: the zero point of stem_relu.output is 0 in "
        "the certified network and 2 in onnxruntime, no optimization",
    )


def averages(include_pad):
    g = Graph()
    x = g.input("x", (2, 6, 6), encoding(-4, 128))
    kernel = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}
    return g.artifact(g.node("AveragePool", "pool", [x], encoding(-4, 128), count_include_pad=include_pad, **kernel))


def test_an_average_that_divides_by_the_padding_too():
    counted, ignored = averages(1), averages(0)
    node, cause = found(counted, plain(to_qdq(counted)), plain(to_qdq(ignored)))
    assert node == "pool"
    assert "different networks: count_include_pad of pool is 1 in" in cause


def test_accumulators_that_float32_cannot_hold():
    g = Graph()
    rng = np.random.default_rng(0)
    x = g.input("x", (512,), encoding(-8, 2**15, 16))
    y = g.layer("Gemm", "fc", x, rng.integers(-128, 128, (64, 512)), grid=encoding(-5, 2**15, 16), k=-7, transB=1)
    artifact = g.artifact(y)
    node, cause = found(artifact, engine.executor(lower(artifact)), plain(to_qdq(artifact)), 200)
    assert node == "fc"
    assert cause.startswith("the rounding of float32 explains all ")
    assert cause.endswith("; float32 is exact to 2^24 = 16,777,216")


def test_a_function_whose_last_bits_are_open():
    g = Graph()
    x = g.input("x", (4096,), encoding(-12, 2**15, 16))
    artifact = g.artifact(g.node("Gelu", "gelu", [x], encoding(-14, 2**15, 16)))
    node, cause = found(artifact, engine.executor(lower(artifact)), plain(to_qdq(artifact)), 32)
    assert node == "gelu"
    assert cause.startswith("the rounding of float32 explains all ")
    assert cause.endswith("executors compute Gelu in float32, each in its own way")


# Executors that compute something else


@dataclass(frozen=True, eq=False)
class Rounding(Requantization):
    """Breaks ties in its own way."""

    rule: str = "away"

    def __call__(self, accumulator, channel_axis=None):
        shift = self.shift.reshape(-1, *[1] * (-1 - channel_axis)) if self.shift.ndim else self.shift
        value = np.asarray(accumulator) / np.exp2(shift)
        rounded = {
            "away": np.copysign(np.floor(np.abs(value) + 0.5), value),
            "up": np.floor(value + 0.5),
            "down": np.ceil(value - 0.5),
            "zero": np.copysign(np.ceil(np.abs(value) - 0.5), value),
            "floor": np.floor(value),
        }[self.rule]
        return np.clip(rounded + self.zero, self.low, self.high).astype(np.int64)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("away", "altered engine rounds ties away from zero, not to even"),
        ("up", "altered engine rounds ties up, not to even"),
        ("down", "altered engine rounds ties down, not to even"),
        ("zero", "altered engine rounds ties towards zero, not to even"),
    ],
)
def test_ties_that_are_rounded_otherwise(network, rule, text):
    def change(step):
        return {"requantization": Rounding(**vars(step.requantization), rule=rule)}

    node, cause = found(network, optimized(to_qdq(network)), altered(network, "residual", change))
    assert node == "residual"
    assert cause.startswith("the exact result lies halfway between two codes in all ")
    assert cause.endswith(text)


def requantization(**fields):
    def change(step):
        rule = step.requantization
        return {"requantization": replace(rule, **{name: field(getattr(rule, name)) for name, field in fields.items()})}

    return change


@pytest.mark.parametrize(
    ("node", "at", "change", "text"),
    [
        ("project", "project", lambda s: {"bias": 2 * s.bias}, "it does not add project.bias as the file has it"),
        ("stem", "stem_relu", lambda s: {"bias": 0 * s.bias}, "it does not add stem.bias as the file has it"),
        ("project", "project", requantization(shift=lambda k: k + 1), "gives 2^-1 times the exact result"),
        ("stem", "stem_relu", requantization(shift=lambda k: k - 2), "gives 2^2 times the exact result"),
        ("project", "project", requantization(zero=lambda z: z + 1), "adds 129 as zero point, not 128"),
        (
            "stem",
            "stem_relu",
            requantization(high=lambda q: 100),
            "altered engine ends at code 100 instead of 255 in all",
        ),
        ("stem", "stem_relu", requantization(high=lambda q: q, low=lambda q: 9), "ends at code 9 instead of 0 in all"),
    ],
)
def test_a_step_that_is_altered(network, node, at, change, text):
    found_at, cause = found(network, optimized(to_qdq(network)), altered(network, node, change))
    assert found_at == at
    assert text in cause


@dataclass(frozen=True, eq=False)
class Wrapping(Requantization):
    """Keeps the lowest eight bits."""

    def __call__(self, accumulator, channel_axis=None):
        wide = replace(self, low=-(2**30), high=2**30)
        return Requantization(**vars(wide))(accumulator, channel_axis) % 256


def test_codes_that_wrap_around():
    g = Graph()
    a, b = (g.input(name, (50,), encoding(-4, 128)) for name in "ab")
    artifact = g.artifact(g.node("Add", "add", [a, b], encoding(-4, 128)))

    def change(step):
        return {"requantization": Wrapping(**vars(step.requantization))}

    node, cause = found(artifact, optimized(to_qdq(artifact)), altered(artifact, "add", change))
    assert node == "add"
    assert "altered engine wraps around instead of saturating in all" in cause


def saturating_pairs(rows, columns):
    """(N, K) unsigned times (M, K) signed -> (N, M) with the sums of neighbouring products held in 16 bits."""
    products = rows[:, None, :] * columns[None]
    return np.clip(products[..., 0::2] + products[..., 1::2], -(2**15), 2**15 - 1).sum(-1)


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_sums_that_saturate_at_16_bits_as_on_a_processor_without_vnni(op):
    g = Graph()
    rng = np.random.default_rng(0)
    shape = (4, 5, 5) if op == "Conv" else (36,)
    weight = rng.integers(-128, 128, (6, 4, 3, 3))
    x = g.input("x", shape, encoding(-6, 20))
    bias, grid, k = rng.integers(-999, 999, 6), encoding(-3, 100), list(rng.integers(-7, -5, 6))
    if op == "Conv":
        y = g.layer(op, "layer", x, weight, bias, grid, k=k)
    else:
        y = g.layer(op, "layer", x, weight.reshape(6, 36), bias, grid, k=k, transB=1)
    artifact = g.artifact(y)
    (step,) = lower(artifact).steps
    columns = weight.transpose(0, 2, 3, 1).reshape(6, 36) if op == "Conv" else weight.reshape(6, 36)

    def run(batch):
        codes = artifact.encodings["x"].quantize(batch[0])
        if op == "Conv":
            patches = np.lib.stride_tricks.sliding_window_view(codes, (3, 3), (2, 3)).transpose(0, 2, 3, 4, 5, 1)
            rows = patches.reshape(-1, 36)
        else:
            rows = codes
        sums = saturating_pairs(rows, columns) - 20 * columns.sum(1) + bias
        q = step.requantization(sums, channel_axis=-1)
        q = q.reshape(len(codes), 3, 3, 6).transpose(0, 3, 1, 2) if op == "Conv" else q
        return [artifact.encodings[y].dequantize(q)]

    other = Executor("16-bit kernel", run, lambda batch: {y: run(batch)[0]})
    node, cause = found(artifact, optimized(to_qdq(artifact)), other)
    assert node == "layer"
    assert cause.startswith("16-bit kernel lets sums of two u8 x s8 products saturate at 16 bits")


@pytest.mark.parametrize(
    ("node", "at", "index", "where"),
    [
        ("stem", "stem_relu", (5, 2, 0, 1), "stem.weight[5, 2, 0, 1]"),
        ("depthwise", "relu6", (3, 0, 2, 1), "[3, 0, 2, 1]"),
    ],
)
def test_one_weight_that_is_another_in_an_executor_without_a_file(network, node, at, index, where):
    def change(step):
        weight = step.weight.copy()
        weight[index] += 9
        return {"weight": weight}

    (step,) = (s for s in lower(network).steps if s.node == node)
    old = step.weight[index]
    found_at, cause = found(network, optimized(to_qdq(network)), altered(network, node, change))
    assert found_at == at
    assert f"altered engine computes with {old + 9} instead of {old} as " in cause
    assert where in cause


def test_a_constant_per_channel_is_found_without_a_reason_only_among_many(network):
    """Four samples of a linear layer have four values per channel: anything would explain them."""
    result = verdict(network, optimized(to_qdq(network)), altered(network, "fc", lambda s: {"bias": s.bias + 999}))
    assert result.first_diverging.cause is None
    assert result.notes == (
        f"altered engine does not give the exact result in {result.first_diverging.differing} elements of fc.output, "
        "onnxruntime, all optimizations gives it",
    )


def test_what_nothing_explains_is_said_to_be_unknown_and_who_is_right(network):
    rng = np.random.default_rng(0)

    def noise(step):
        return {
            "weight": step.weight + rng.integers(-3, 4, step.weight.shape) * (np.arange(8) == 5)[:, None, None, None]
        }

    wrong = altered(network, "stem", noise)
    result = verdict(network, wrong, optimized(to_qdq(network)))
    found = result.first_diverging
    assert (found.node, found.cause) == ("stem_relu", None)
    assert result.notes == (
        f"altered engine does not give the exact result in {found.differing:,} elements of channel 5 of "
        "stem_relu.output, onnxruntime, all optimizations gives it",
    )


def test_a_difference_is_found_in_tensors_whose_batch_an_executor_joins_to_the_next_dimension(network):
    wrong = altered(network, "stem", lambda step: {"bias": step.bias + 99})

    def joined(batch):
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in wrong.tensors(batch).items()}

    assert found(network, optimized(to_qdq(network)), replace(wrong, tensors=joined))[0] == "stem_relu"


def test_nan_is_named(network):
    reference = plain(to_qdq(network))
    broken = Executor("broken", lambda batch: [y * np.float32("nan") for y in reference.run(batch)], lambda batch: {})
    assert found(network, reference, broken) == ("fc", "broken gives NaN or infinity")


def test_without_an_exact_result_the_certificate_is_asked(network):
    """A node that the reference evaluator does not know."""
    artifact = residual_network()
    artifact.model.graph.node[-1].op_type = "Unknown"
    tensors = plain(to_qdq(network)).tensors
    one = Executor("one", lambda batch: [tensors(batch)["fc.output"]], tensors)
    two = Executor("two", lambda batch: [tensors(batch)["fc.output"] + 1], lambda batch: {})
    batches = ort.random_batches(to_qdq(network), 8)
    (result,) = compare(one, [two], batches, artifact)
    assert result.first_diverging.cause == "nothing is known about Unknown"
    assert isinstance(artifact.model, onnx.ModelProto)
