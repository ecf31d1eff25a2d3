"""Targets: descriptions are read strictly, plans that one refuses are named, and its rounding holds everywhere."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pow2quant import plugins, simulate, targets
from pow2quant.adapters import onnx_qdq
from pow2quant.backends import fitting
from pow2quant.backends.base import SILENT
from pow2quant.compiled import unavailable
from pow2quant.config import RunConfig, dump, from_mapping, plan_of, with_values
from pow2quant.errors import ConfigError, FileFormatError
from pow2quant.integer.certificate import certify
from pow2quant.integer.emit_c import code
from pow2quant.integer.lower import lower
from pow2quant.integer.run import dequantize, quantize, trace
from pow2quant.pow2_constraints import Format, Observed, power_of_two
from pow2quant.pow2_constraints.arithmetic import ROUNDINGS, round_real
from pow2quant.pow2_constraints.joint import choose_jointly
from pow2quant.runs.executors import simulation_executor
from pow2quant.runs.job import Job
from pow2quant.targets.reading import KEY, parse
from pow2quant.targets.words import sentences
from pow2quant.validation.c99 import Library
from tests.target_networks import Everything

KINDS = tuple(field.name for field in fields(targets.Roundings))


class Ratio(torch.nn.Module):
    """A quotient of two tensors of either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.above, self.below = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(x) / self.below(x)


def run(rounding: targets.Roundings, batch: torch.Tensor, network: type[torch.nn.Module] = Everything):
    """The simulation's tensors, and the program of its QDQ file, for a target that rounds so."""
    torch.manual_seed(0)
    plan = replace(plan_of(RunConfig()), target=replace(targets.DEFAULT, name="mine", rounding=rounding))
    sim = simulate(network().eval(), batch[:1], plan)
    sim.calibrate([batch])
    seen = {}

    def record(site, x, quantized):
        if site.role in ("input", "output"):
            seen[site.name] = quantized.numpy().copy()
        return quantized

    with torch.no_grad(), sim.intercept(record):
        sim.model(batch)
    artifact = sim.export(batch[:1])
    return seen, artifact, lower(onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact)))


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randn(8, 3, 14, 14, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("rule", "network"), [(r, Everything) for r in ROUNDINGS] + [(r, Ratio) for r in ROUNDINGS if r != "gemmlowp"]
)
def test_every_rounding_is_the_same_in_simulation_engine_and_c(rule, network, batch):
    rules = dict.fromkeys(KINDS, rule) | ({"functions": "half_away"} if rule == "gemmlowp" else {})
    seen, _, program = run(targets.Roundings(**rules), batch, network)
    codes = quantize(program, [batch.numpy()])
    engine = dequantize(program, trace(program, codes))
    assert {name: int((engine[name] != seen[name]).sum()) for name in seen} == dict.fromkeys(seen, 0)
    if not unavailable():
        compiled = dequantize(program, Library(program, ("-std=c99", "-O1")).trace(codes))
        assert {name: int((compiled[name] != x).sum()) for name, x in engine.items()} == dict.fromkeys(engine, 0)


@pytest.mark.parametrize("rule", ["half_even", "half_up", "floor"])
def test_tables_of_functions_are_rounded_as_the_target_says(rule, batch, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.LeakyReLU(0.25)).eval()
    target = replace(targets.DEFAULT, name="mine", rounding=targets.Roundings(functions=rule))
    sim = simulate(network, batch[:1], replace(plan_of(RunConfig()), target=target))
    sim.calibrate([batch])
    seen = simulation_executor(sim, "custom", torch.device("cpu")).tensors([batch.numpy()])
    artifact = sim.export(batch[:1])
    result = artifact.encodings["1.output"]
    real = seen["0.output"] * np.where(seen["0.output"] < 0, np.float32(0.25), np.float32(1))
    wanted = np.clip(round_real(real / result.scale, rule) + result.zero_point, result.grid.qmin, result.grid.qmax)
    assert (seen["1.output"] == result.dequantize(wanted.astype(np.int64))).all()
    assert (np.abs(real / result.scale % 1) == 0.5).any()
    onnx_qdq.export_qdq(artifact, tmp_path)
    for name in ("onnxruntime", "engine"):
        for executor in plugins.resolve("validators", name)(tmp_path / "model.onnx"):
            assert (executor.run([batch.numpy()])[0] == seen["1.output"]).all()


def test_a_file_says_which_target_it_is_for_and_the_default_says_nothing(batch):
    sim = simulate(Everything().eval(), batch[:1])
    sim.calibrate([batch])
    assert KEY not in {entry.key for entry in sim.export(batch[:1]).model.metadata_props}
    _, artifact, _ = run(targets.Roundings(sums="half_up"), batch)
    read = onnx_qdq.from_qdq(onnx.ModelProto.FromString(onnx_qdq.to_qdq(artifact).SerializeToString()))
    assert targets.of(read.model) == replace(targets.DEFAULT, name="mine", rounding=targets.Roundings(sums="half_up"))
    damaged = onnx.ModelProto()
    damaged.metadata_props.add(key=KEY, value='{"rounding": {"sums": "sideways"}}')
    with pytest.raises(FileFormatError, match=r"rounding\.sums"):
        targets.of(damaged)


def test_the_certificate_is_of_the_target(batch):
    _, artifact, _ = run(targets.Roundings(sums="half_up"), batch)
    found = {layer.node: layer for layer in certify(artifact).layers}
    assert found["first"].proved
    assert not found["add"].proved
    assert found["add"].proved_integers
    assert "mine rounds it half_up" in found["add"].reason


def test_default_rounding_writes_the_names_it_always_had(batch):
    _, _, program = run(targets.Roundings(), batch)
    assert "half_up" not in code(program)["kernels.h"]
    _, _, other = run(targets.Roundings(sums="half_up"), batch)
    assert "shift_round_s32_half_up" in code(other)["kernels.h"]


@pytest.mark.parametrize("name", targets.presets())
def test_every_preset_says_what_it_is(name):
    target = targets.load(name)
    assert target.name == name
    assert target.summary
    assert target.source
    assert any(line.startswith("Executors:") for line in sentences(target))
    for kind, named in (("validators", target.executors), ("exporters", target.formats)):
        assert all(plugins.resolve(kind, each) for each in named)


def test_the_default_preset_has_the_default_arithmetic():
    assert replace(targets.load("onnxruntime"), summary="", source="") == targets.DEFAULT


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rounding: {sums: half_odd}", 'rounding.sums: "half_odd" is not legal; legal: one of floor, gemmlowp'),
        ("roundings: 3", "roundings: unknown key, did you mean rounding?; known: name, summary"),
        ("limits: {accumulator: 20}", "limits.accumulator: unknown key, did you mean accumulator_bits?"),
        ("limits: {weight_bits: [8.5]}", "limits.weight_bits: [8.5] is not legal; legal: a list of integers from 2 to"),
        ("limits: {weight_bits: [8, 17]}", "limits.weight_bits: [8, 17] is not legal"),
        (
            "limits: {product_shift: [3, 1]}",
            "limits.product_shift: [3, 1] is not legal; legal: two integers, the least",
        ),
        ("limits: {accumulator_bits: 0}", "limits.accumulator_bits: 0 is not legal; legal: an integer from 2 to 64"),
        ("limits: {bias_bits: '20'}", 'limits.bias_bits: "20" is not legal; legal: an integer from 8 to 32'),
        (
            "limits: {operations: [Convolution]}",
            "limits.operations: ['Convolution'] is not legal; legal: a list of Abs",
        ),
        ("limits: null", "limits: null is not legal; legal: a mapping with keys of weight_bits"),
        ("tied_sums: 1", "tied_sums: 1 is not legal; legal: true or false"),
        ("executors: [engin]", "executors: ['engin'] is not legal; legal: a list of c, "),
        ("formats: []", "formats: [] is not legal; legal: a list of aimet-0.6.1, "),
        ("base: nowhere", "nowhere"),
        ("- 3", "expected keys"),
        ("a: &a [x]\nb: [*a", "mine.yaml"),
    ],
)
def test_a_description_that_is_wrong_is_named(text, named):
    with pytest.raises(ConfigError, match=r"mine\.yaml") as caught:
        parse(text, "mine.yaml")
    assert named in str(caught.value)


def test_a_file_starts_from_a_preset(tmp_path):
    file = tmp_path / "chip.yaml"
    file.write_text("base: generic-shift\nrounding: {sums: floor}\n")
    target = targets.load(str(file))
    assert (target.name, target.rounding.sums, target.rounding.products) == ("chip", "floor", "half_up")
    assert target.limits == targets.load("generic-shift").limits


def test_the_target_in_the_documentation_is_one(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs" / "targets.md").read_text(encoding="utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    target = targets.load(str(file))
    assert target.limits.accumulator_bits == 24
    assert target.rounding.sums == "floor"


def test_an_unknown_target_is_an_error_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'gpu' is unknown; known: .*onnxruntime"):
        with_values(RunConfig(), {"target": "gpu"})


def test_what_a_target_needs_stands_where_the_plan_has_the_default():
    config = with_values(RunConfig(), {"quantization.weight.bitwidth": 8, "target": "esp32-s3"})
    q = config.quantization
    assert (q.weight.per_channel, q.output.symmetric, q.input.symmetric, q.bias.bits) == (False, True, True, 20)
    assert from_mapping({"target": "esp32-s3"}) == config
    assert from_mapping(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize(
    ("target", "values", "tensor", "rule"),
    [
        ("esp32-s3", {"quantization.weight.per_channel": True}, "first.weight", "per_tensor"),
        ("esp32-s3", {"quantization.output.symmetric": False}, "relu.output", "symmetric"),
        ("esp32-s3", {"quantization.bias.bitwidth": 32}, "first.bias", "bias_bits"),
        ("litert", {"quantization.weight.bitwidth": 4}, "first.weight", "weight_bits"),
        ("litert", {"quantization.output.bitwidth": 16}, "relu.output", "output_bits"),
        ("generic-shift", {"quantization.output.power_of_2": False}, "relu.output", "powers of two"),
    ],
)
def test_a_plan_that_a_target_does_not_take_names_tensor_and_rule(target, values, tensor, rule, batch):
    plan = plan_of(with_values(with_values(RunConfig(), {"target": target}), values))
    with pytest.raises(ConfigError) as caught:
        simulate(Everything().eval(), batch[:1], plan)
    assert str(caught.value).startswith(f"{tensor}: ")
    assert rule in str(caught.value)
    assert f"target {target}" in str(caught.value)


def test_an_operation_that_a_target_does_not_have_is_named(batch):
    few = replace(targets.DEFAULT, name="few", limits=targets.Limits(operations=("Conv", "Relu", "Add")))
    with pytest.raises(ConfigError, match=r"sigmoid: Sigmoid; target few .*limits.operations: Conv, Relu, Add"):
        simulate(Everything().eval(), batch[:1], replace(plan_of(RunConfig()), target=few))


def test_aimet_rounds_half_even_only(batch):
    pytest.importorskip("aimet_torch")
    plan = plan_of(with_values(RunConfig(), {"target": "generic-shift"}))
    with pytest.raises(ConfigError, match="the aimet backend rounds half_even only"):
        simulate(Everything().eval(), batch[:1], plan, "aimet")


def test_float64_sums_are_rounded_by_the_target(batch):
    wide = with_values(RunConfig(), {"quantization.output.bitwidth": 16, "quantization.input.bitwidth": 16})
    plan = replace(plan_of(wide), target=replace(targets.DEFAULT, rounding=targets.Roundings(*["half_away"] * 5)))
    sim = simulate(Everything().eval(), batch[:1], plan)
    sim.calibrate([batch])
    program = lower(sim.export(batch[:1]))
    codes = quantize(program, [batch.numpy()])
    engine = dequantize(program, trace(program, codes))
    with torch.no_grad():
        out = sim.model(batch).numpy()
    assert np.array_equal(engine[program.outputs[0]], out)


def calibrated(target: targets.Target, batch: torch.Tensor, **values):
    torch.manual_seed(0)
    plan = replace(plan_of(with_values(RunConfig(), values)), target=target)
    sim = simulate(Everything().eval(), batch[:1], plan)
    sim.calibrate([batch])
    return sim


def test_a_tied_sum_has_one_exponent_and_its_own_zero_points(batch):
    sim = calibrated(replace(targets.DEFAULT, name="tied", tied_sums=True), batch)
    assert sim.placement.tied == (("concat.output", "mul.output", "relu.output", "relu_1.output", "second.output"),)
    table = sim.encodings()
    found = {name: table[name] for name in sim.placement.tied[0]}
    assert len({int(e.exponent) for e in found.values()}) == 1
    assert [int(found[name].zero_point) for name in ("relu.output", "relu_1.output")] == [0, 0]
    assert found["second.output"].zero_point > 0
    step = next(s for s in lower(sim.export(batch[:1])).steps if type(s).__name__ == "Sum")
    assert (step.shifts, int(step.requantization.shift)) == ((0, 0), 0)


def test_an_open_sum_reads_what_a_layer_accumulated(batch):
    sim = calibrated(replace(targets.DEFAULT, name="open", open_sums=True), batch)
    assert "second.output" not in {site.name for site in sim.sites}
    artifact = sim.export(batch[:1])
    program = lower(onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact)))
    accumulated = program.tensors["second.output"]
    assert accumulated.encoding.grid.width > 16
    assert accumulated.dtype == np.int32
    with torch.no_grad():
        expected = sim.model(batch).numpy()
    codes = quantize(program, [batch.numpy()])
    engine = dequantize(program, trace(program, codes))
    assert np.array_equal(engine[program.outputs[0]], expected)
    if not unavailable():
        compiled = dequantize(program, Library(program, ("-std=c99", "-O1")).trace(codes))
        assert {name: int((compiled[name] != x).sum()) for name, x in engine.items()} == dict.fromkeys(engine, 0)
    assert all(layer.proved for layer in certify(artifact).layers if layer.node in ("second", "add"))


@settings(max_examples=10)
@given(scales=st.lists(st.integers(-6, 6), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_the_joint_exponent_is_the_one_of_least_noise(scales, seed):
    rng = np.random.default_rng(seed)
    data = [rng.standard_normal(200).astype(np.float32) * np.float32(2.0**s) for s in scales]
    data[0] = np.abs(data[0])
    observed, form = [Observed.of(x) for x in data], Format(8, symmetric=False)
    chosen = choose_jointly("mse", observed, [form] * len(data))

    def noise(k: int) -> float:
        even = [[form.encoding(power_of_two([k]), z) for z in range(0, 256, 2)] for _ in data]
        zero = [[form.encoding(power_of_two([k]), 0)], *even[1:]]  # non-negative data have zero point 0
        errors = [
            min(float(np.square(x.astype(np.float64) - e.fake_quantize(x)).mean()) for e in candidates)
            for x, candidates in zip(data, zero, strict=True)
        ]
        return sum(errors)

    k = int(chosen[0].exponent)
    assert {int(e.exponent) for e in chosen} == {k}
    mine = sum(
        float(np.square(x.astype(np.float64) - e.fake_quantize(x)).mean()) for x, e in zip(data, chosen, strict=True)
    )
    assert mine <= min(noise(j) for j in (k - 1, k, k + 1)) * (1 + 1e-9)


@pytest.mark.parametrize("ends", [(0, 6), (9, 20), (7, 7)])
def test_shifts_are_within_what_the_target_can_do(ends, batch):
    limits = targets.Limits(product_shift=ends)
    sim = calibrated(replace(targets.DEFAULT, name="narrow", limits=limits), batch)
    program = lower(sim.export(batch[:1]))
    shifts = [s.requantization.shift for s in program.steps if type(s).__name__ in ("Convolution", "Dense")]
    assert len(shifts) == 4
    assert all((ends[0] <= shift).all() and (shift <= ends[1]).all() for shift in shifts)


def test_sums_shift_within_what_the_target_can_do(batch):
    limits = targets.Limits(sum_shift=(0, 0))
    sim = calibrated(replace(targets.DEFAULT, name="level", limits=limits), batch)
    assert [result for result, _ in sim.placement.sums] == ["relu_1.output", "concat.output"]
    for result, operands in sim.placement.sums:
        assert len({int(sim.encodings()[name].exponent) for name in (result, *operands)}) == 1


@pytest.mark.parametrize("bits", [20, 16, 14])
def test_sums_fit_the_accumulator(bits, batch):
    target = replace(targets.DEFAULT, name="small", limits=targets.Limits(accumulator_bits=bits))
    found = {
        layer.node: layer.bits for layer in certify(calibrated(target, batch).export(batch[:1])).layers if layer.bits
    }
    assert {name: found[name] for name in ("first", "second", "depthwise", "last")}
    assert max(found[name] for name in ("first", "second", "depthwise", "last")) <= bits


@pytest.mark.parametrize("method", ["output_mse", "gptq"])
def test_a_method_keeps_to_the_accumulator_and_the_shifts(method, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text("limits: {accumulator_bits: 19, product_shift: [5, 9], sum_shift: [0, 1], per_tensor: true}")
    values = {"target": str(file), "ptq.methods": [method], "ptq.calibration_batches": 1}
    job = Job.start(with_values(RunConfig(), values), SILENT)
    sim = job.quantized()
    fitting.require(sim.placement, sim.encodings())
    assert max(layer.bits for layer in certify(sim.export(job.example)).layers) <= 19


def test_an_accumulator_that_no_weight_fits_is_refused_by_the_layers_name(batch):
    target = replace(targets.DEFAULT, name="tiny", limits=targets.Limits(accumulator_bits=2))
    with pytest.raises(ConfigError, match=r"first: its sums do not fit 2 bits, as target tiny asks"):
        calibrated(target, batch)


def test_encodings_that_a_method_changed_are_checked(batch):
    sim = calibrated(replace(targets.DEFAULT, name="tied", tied_sums=True), batch)
    table = sim.encodings()
    fitting.require(sim.placement, table)
    table["second.output"] = replace(table["second.output"], scale=table["second.output"].scale * 2)
    with pytest.raises(ConfigError, match=r"target tied ties them"):
        fitting.require(sim.placement, table)
    sim = calibrated(replace(targets.DEFAULT, name="few", limits=targets.Limits(product_shift=(0, 9))), batch)
    table = sim.encodings()
    table["first.weight"] = replace(table["first.weight"], scale=table["first.weight"].scale / 1024)
    with pytest.raises(ConfigError, match=r"first: its shift is outside"):
        fitting.require(sim.placement, table)
