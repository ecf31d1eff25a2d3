"""Weights with one exponent for each output channel and block of inputs, from calibration to every executor."""

import itertools
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from pow2quant import Encoding, IntGrid, QuantPlan, TensorSpec, prepare, simulate
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.config import BLOCKS, RunConfig, with_values
from pow2quant.errors import ConfigError, EncodingError, FileFormatError
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.methods.adaround import AdaRound
from pow2quant.methods.bias_correction import BiasCorrection
from pow2quant.methods.gptq import Gptq
from pow2quant.methods.output_mse import OutputMse
from pow2quant.pow2_constraints import Format, power_of_two
from pow2quant.pow2_constraints.blocks import WIDEST, choose_blocks
from pow2quant.run_folder import load_state, save_state
from pow2quant.runs.executors import simulation_executor
from pow2quant.runs.job import methods_of
from pow2quant.validation import c99, engine, ort
from pow2quant.validation.agreement import compare

EVERY = {"first.weight": 16, "wide.weight": 16, "grouped.weight": 16, "depthwise.weight": None}
EVERY |= {"up.weight": 16, "head.weight": 16}
SCALES = {
    "first.weight": (20, 1, 1, 1),
    "wide.weight": (32, 2, 3, 3),
    "grouped.weight": (32, 1, 1, 1),
    "up.weight": (2, 24, 2, 2),
    "head.weight": (5, 2),
}


class Network(nn.Module):
    """Blocks that divide the inputs (32 by 16) and that do not (20, 24), grouped, transposed, and none at all."""

    def __init__(self):
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 20, 1), nn.Conv2d(20, 32, 3, padding=1)
        self.grouped, self.depthwise = nn.Conv2d(32, 32, 1, groups=2), nn.Conv2d(32, 32, 3, groups=32)
        self.up, self.head = nn.ConvTranspose2d(32, 24, 2, stride=2), nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.wide(torch.relu(self.first(x))))
        x = self.up(torch.relu(self.depthwise(torch.relu(self.grouped(x)))))
        return self.head(x.mean((2, 3)))


def simulated(bits=4, block=16, **changes):
    """Weights of very different sizes, so that blocks of a channel ask for different exponents."""
    torch.manual_seed(0)
    model, x = Network(), torch.randn(8, 3, 5, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= torch.exp(2 * torch.randn_like(parameter))
    plan = QuantPlan(weight=TensorSpec(bits, symmetric=True, per_channel=True, block=block, **changes))
    sim = simulate(prepare(model, x), x, plan)
    sim.calibrate([x])
    return sim, x


def blocked(shape=(2, 20, 2), axis=0, block=16, bits=4):
    scales = [-(-n // block) if d == 1 - axis else n for d, n in enumerate(shape)]
    k = np.random.default_rng(0).integers(-6, -2, scales)
    return Encoding(power_of_two(k), np.zeros((), np.int64), IntGrid(bits, signed=True), axis, block)


@pytest.mark.parametrize(("shape", "axis"), [((2, 20, 2), 0), ((20, 3), 1), ((2, 32), 0), ((17, 2, 2, 1), 1)])
def test_every_block_is_quantized_by_its_own_scale(shape, axis):
    encoding = blocked(shape, axis)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    codes, values = encoding.quantize(x), encoding.fake_quantize(x)
    units = encoding.per_channel
    for at in itertools.product(*map(range, shape)):
        place = tuple(i // 16 if d == 1 - axis else i for d, i in enumerate(at))
        scale = float(encoding.scale[place])
        assert codes[at] == np.clip(np.rint(x[at] / scale), -8, 7)
        assert values[at] == codes[at] * scale
        assert units.scale[at[axis]] == min(
            encoding.scale[p] for p in np.ndindex(encoding.scale.shape) if p[axis] == at[axis]
        )
    assert np.array_equal(units.fake_quantize(values), values)  # the same values, in units of the channel


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block": 0}, "at least one value"),
        ({"axis": 2}, "axis 0 or 1"),
        ({"scale": np.float32(1)}, "the tensor's rank"),
        ({"grid": IntGrid(4, signed=False)}, "signed grid"),
        ({"zero_point": np.array(2)}, "zero point 0"),
    ],
)
def test_impossible_blocks_are_refused(change, words):
    with pytest.raises(EncodingError, match=words):
        replace(blocked(), **change)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(EncodingError, match=r"in blocks of 16 has scales \(2, 3, 2\), not \(2, 2, 2\)"):
        blocked().quantize(np.zeros((2, 33, 2)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_exponent_is_that_of_least_error_within_what_a_byte_holds(bits):
    rng = np.random.default_rng(bits)
    weight = (rng.normal(size=(3, 40, 2)) * np.exp(2 * rng.normal(size=(3, 1, 2)))).astype(np.float32)
    weight[0, 16:32] = 0
    found = choose_blocks("mse", weight, Format(bits, symmetric=True, axis=0), 16)
    assert found.scale.shape == (3, 3, 2)

    def error(part, k):
        codes = np.clip(np.rint(np.ldexp(part.astype(np.float64), -k)), found.grid.qmin, found.grid.qmax)
        return float(np.square(part - np.ldexp(codes, k)).sum())

    for o in range(3):
        parts = {(b, p): weight[o, 16 * b : 16 * b + 16, p] for b in range(3) for p in range(2)}
        best = {at: min(range(20, -30, -1), key=lambda k: error(part, k)) for at, part in parts.items() if part.any()}
        largest = max(best.values())
        for at in parts:
            assert found.exponent[(o, *at)] == max(best.get(at, largest), largest - (WIDEST - bits))
    assert found.per_channel.grid.width <= WIDEST


@pytest.mark.parametrize("bits", [2, 4])
def test_every_executor_agrees_and_all_is_proved(bits):
    sim, _ = simulated(bits)
    artifact = sim.export(torch.zeros(1, 3, 5, 5))
    weights = {n: e for n, e in artifact.encodings.items() if n in EVERY}
    assert {n: e.block for n, e in weights.items()} == EVERY
    assert {n: e.scale.shape for n, e in weights.items() if e.block} == SCALES
    assert max(len(np.unique(e.exponent - e.per_channel.exponent.min())) for e in weights.values()) > 2
    certificate, program = certify(artifact), lower(artifact)
    assert certificate.proved
    file = onnx_qdq.to_qdq(artifact)
    executors = [ort.plain(file), ort.optimized(file), engine.executor(program), c99.executor(program)]
    reference = simulation_executor(sim, "custom", torch.device("cpu"))
    batch = [torch.randn(32, 3, 5, 5).numpy() * 3]
    for found in compare(reference, executors, [batch], artifact, proof=certificate):
        assert (found.executor, found.differing, found.claim) == (found.executor, 0, "proved")
    (basic, extended) = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED")
    for level in (basic, extended):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(None, {"x": batch[0]})[0], reference.run(batch)[0])


def test_the_accumulator_bound_counts_the_spread_of_exponents():
    """In units of the smallest exponent: brute force over the codes of one layer, each shifted by its block's."""
    sim, x = simulated(3)
    artifact = sim.export(x)
    (bound,) = (layer for layer in certify(artifact).layers if layer.node == "head")
    table, (layer,) = sim.encodings(), (y for y in sim.placement.layers if y.module == "head")
    weight, source = table["head.weight"], table[layer.input.name]
    codes = weight.quantize(sim.parameter("head.weight").detach().numpy())
    shifts = weight.along(weight.exponent, codes.shape) - weight.exponent.min(1, keepdims=True)
    steps, ends = codes << shifts, [int(end - source.zero_point) for end in (0, source.grid.qmax)]
    bias = np.rint(sim.parameter("head.bias").detach().numpy() / table["head.bias"].scale)
    high = np.maximum(steps * ends[0], steps * ends[1]).sum(1) + np.maximum(bias, 0)
    low = np.minimum(steps * ends[0], steps * ends[1]).sum(1) + np.minimum(bias, 0)
    assert bound.accumulator_max == np.maximum(high, -low).max()


def test_files_are_read_back_to_the_same_encodings(tmp_path):
    sim, x = simulated(3)
    artifact = sim.export(x)
    file = onnx_qdq.to_qdq(artifact)
    (dq,) = (n for n in file.graph.node if n.op_type == "DequantizeLinear" and n.output[0] == "up.weight")
    assert {a.name: a.i for a in dq.attribute} == {"axis": 0, "block_size": 16}
    again = onnx_qdq.from_qdq(file)
    assert again.encodings == artifact.encodings
    assert onnx_qdq.to_qdq(again).SerializeToString() == file.SerializeToString()
    parameters = {tensor.name for tensor in artifact.model.graph.initializer}
    for version in ("1.0.0", "2.0.0"):
        text = aimet_encodings.dumps(artifact.encodings, parameters, version)
        assert '"block_size": 16' in text
        assert aimet_encodings.loads(text) == artifact.encodings
    with pytest.raises(FileFormatError, match="needs the shape of 4608 scales"):  # such as AIMET itself writes
        aimet_encodings.loads(
            aimet_encodings.dumps({"w": blocked((32, 32, 9, 8))}, {"w"}, "1.0.0").replace("block_scales", "other")
        )
    with pytest.raises(ConfigError, match=r"0\.6\.1 has no scales for blocks"):
        aimet_encodings.dumps(artifact.encodings, parameters, "0.6.1")
    save_state(tmp_path / "state", {}, sim.encodings(), "")
    assert load_state(tmp_path / "state")[1] == sim.encodings()


def test_a_file_with_blocks_that_onnxruntime_does_not_run_is_not_written():
    sim, x = simulated()
    artifact = sim.export(x)
    wide = artifact.encodings["wide.weight"]
    table = artifact.encodings | {"wide.weight": replace(wide, grid=IntGrid(5, signed=True))}
    with pytest.raises(EncodingError, match=r"wide.weight: 5 bits in blocks of 16; onnxruntime runs .* at most 4"):
        onnx_qdq.to_qdq(replace(artifact, encodings=table))
    assert onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact.per_channel())).encodings["wide.weight"].block is None


METHODS = {"gptq": Gptq(), "adaround": AdaRound(iterations=4), "output_mse": OutputMse(), "bias": BiasCorrection()}


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_blocks_and_a_file_that_agrees(name):
    sim, x = simulated(3)
    METHODS[name].apply(sim, [x])
    artifact = sim.export(x)
    assert {n: e.block for n, e in artifact.encodings.items() if n in EVERY} == EVERY
    with torch.no_grad():
        expected = sim.model(x).numpy()
    assert np.array_equal(ort.optimized(onnx_qdq.to_qdq(artifact)).run([x.numpy()])[0], expected)


def test_gptq_leaves_less_error_than_rounding_with_the_same_blocks():
    def error(method):
        sim, x = simulated(2)
        with torch.no_grad():
            method.apply(sim, [x])
            return float((sim.model(x) - sim.network(x)).square().mean())

    assert error(Gptq()) < error(BiasCorrection())


def test_gradients_pass_where_no_block_saturates():
    sim, x = simulated()
    weight, encoding = sim.parameter("head.weight"), sim.encodings()["head.weight"]
    sim.model(x).sum().backward()
    values = weight.detach().numpy()
    codes = np.rint(values / encoding.along(encoding.scale, values.shape))
    inside = (codes >= encoding.grid.qmin) & (codes <= encoding.grid.qmax)
    assert inside.any()
    assert not inside.all()
    assert not weight.grad.numpy()[~inside].any()
    assert weight.grad.numpy()[inside].any()


def config(**values):
    return with_values(RunConfig(), {f"quantization.weight.{key}": value for key, value in values.items()})


def test_what_cannot_have_blocks_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"quantization.weight.block: 24 is not legal; legal: .*16, 32, 64, 128"):
        config(block=24)
    with pytest.raises(
        ConfigError, match=r"quantization.weight.block: 16 is not legal; legal: null without .*per_channel"
    ):
        config(per_channel=False, block=16)
    with pytest.raises(ConfigError, match=r"quantization\.output\.block"):
        with_values(RunConfig(), {"quantization.output.block": BLOCKS[0]})
    with pytest.raises(ConfigError, match=r"first.weight: block: 16 has no effect with 8 bits.* 2 to 4 bits"):
        simulated(8)
    chosen = with_values(config(bitwidth=4, block=32), {"ptq.methods": ["gpfq"]})
    with pytest.raises(ConfigError, match=r"gpfq does not work on weights with blocks .*those that do: .*gptq"):
        methods_of(chosen)
