"""A quantized network in Python, made by hand: what people try first works, or one line says what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pow2quant
from pow2quant.adapters.aimet_encodings import export_1_0_0
from pow2quant.adapters.onnx_qdq import export_qdq
from pow2quant.config import TensorSpec
from pow2quant.errors import ConfigError, DataError, ModelError, Pow2QuantError
from pow2quant.integer.emit_c import export_c
from pow2quant.methods.adaround import AdaRound

torch.manual_seed(0)
X, Y = torch.rand(16, 1, 8, 8), torch.arange(16) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.fixture
def sim() -> pow2quant.Simulated:
    made = pow2quant.simulate(network(), X[:1])
    made.calibrate([X[:8], X[8:]])
    return made


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(TensorDataset(X, Y), 8),
        lambda: (x for x, _ in DataLoader(TensorDataset(X, Y), 8)),
        lambda: [(X[:8], Y[:8]), (X[8:], Y[8:])],
        lambda: [[X[:8]], [X[8:]]],
        lambda: [{"image": X[:8], "label": Y[:8]}, {"image": X[8:], "label": Y[8:]}],
        lambda: [X[:8].numpy().astype(np.float64), X[8:].numpy()],
        lambda: X,
        lambda: (X, Y),
        lambda: TensorDataset(X, Y),
    ],
)
def test_calibration_takes_data_as_people_have_them(data: Callable[[], Any], sim: pow2quant.Simulated) -> None:
    other = pow2quant.simulate(network(), X[:1])
    assert "not calibrated" in repr(other)
    assert other.calibrate(data()) == sim.encodings()


def test_it_is_called_and_corrected_by_methods(sim: pow2quant.Simulated) -> None:
    with torch.no_grad():
        assert torch.equal(sim(X), sim.model(X))
        before = sim(X)
        assert (
            sim.apply("bias_correction").apply({"adaround": {"iterations": 2}}, X).apply(AdaRound(iterations=1)) is sim
        )
        assert not torch.equal(sim(X), before)


def test_it_is_exported_with_plain_paths(sim: pow2quant.Simulated, tmp_path: Path) -> None:
    artifact = sim.export(str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.onnx").is_file()
    written = {export_qdq(artifact, str(tmp_path / "a")), artifact.save(str(tmp_path / "b"))}
    assert len({path.read_bytes() for path in written | {tmp_path / "out" / "model.onnx"}}) == 1
    assert export_1_0_0(artifact, str(tmp_path / "a")).is_file()
    assert (export_c(artifact, str(tmp_path / "c")) / "model.h").is_file()
    assert (artifact.save(tmp_path / "d", "c") / "model.c").read_bytes() == (tmp_path / "c" / "model.c").read_bytes()
    assert pow2quant.export(sim, "integers", tmp_path / "e")[0].is_dir()


def test_executors_are_compared_on_one_s_own_data(sim: pow2quant.Simulated, tmp_path: Path) -> None:
    file = sim.export().save(tmp_path)
    for source in (sim, sim.export(), file, str(file)):
        found = pow2quant.validate(source, data=(X, Y))
        assert found.agrees
        assert all(a.elements == 16 * 3 for a in found.agreements)
        assert {"onnxruntime, all optimizations"} <= {a.executor for a in found.agreements}
        assert pow2quant.certificate(source).sentence == found.certificate.sentence
    result = pow2quant.quantize(network(), (X, Y), progress=False)
    assert pow2quant.validate(result, data=X[:5]).agreements[0].elements == 15
    assert pow2quant.validate(result.folder / "model.onnx", data=X[:5]).agrees


def test_a_plan_checks_itself() -> None:
    assert pow2quant.QuantPlan(weight_bits=4) == pow2quant.QuantPlan.default(weight_bits=4)
    plan = pow2quant.QuantPlan(output=None, weight_bits=3, per_tensor=True)
    assert (plan.weight, plan.output) == (TensorSpec(3, symmetric=True), None)
    for values, words in (
        ({"weight_bits": 40}, "plan.weight.bitwidth: 40 is not legal; legal: an integer from 2 to 16"),
        ({"bias": TensorSpec(32, symmetric=False)}, "plan.bias.symmetric"),
        ({"overrides": (("a.*", {"output": TensorSpec(1, symmetric=False)}),)}, "plan.overrides.a.*.output.bitwidth"),
    ):
        with pytest.raises(ConfigError, match=words.replace("*", r"\*")):
            pow2quant.QuantPlan(**values)


@pytest.mark.parametrize(
    ("act", "error", "expected"),
    [
        (lambda sim: pow2quant.simulate(network()), ConfigError, "example: needed"),
        (lambda sim: pow2quant.simulate(network(), DataLoader(X)), ConfigError, "example: needed"),
        (lambda sim: pow2quant.simulate(network(), X, weight_bits=1), ConfigError, "plan.weight.bitwidth: 1"),
        (lambda sim: pow2quant.simulate(network(), X)(X), Pow2QuantError, "calibrate"),
        (lambda sim: sim.apply("adarund"), ConfigError, "adaround"),
        (lambda sim: sim.apply("equalize"), ConfigError, "quantize(model, data, methods=[...])"),
        (lambda sim: sim.apply("gpfq:=3"), ConfigError, "legal: NAME or NAME:parameter=value"),
        (lambda sim: pow2quant.simulate(network(), X).apply("adaround"), DataError, "calibrate(data) first"),
        (lambda sim: sim.calibrate([X / 0]), DataError, "calibration data, batch 0: holds NaN or infinity"),
        (
            lambda sim: sim.calibrate([X, X[0]]),
            DataError,
            "batch 1: has the shape (N, 8, 8), batches before it (N, 1, 8, 8)",
        ),
        (lambda sim: sim.calibrate([X.long()]), ModelError, "fails on calibration data of (16, 1, 8, 8) int64: "),
        (lambda sim: sim.calibrate([X[:, :, :5]]), ModelError, "fails on calibration data of (16, 1, 5, 8) float32: "),
        (lambda sim: sim.calibrate(7), DataError, "expected a DataLoader or another iterable"),
        (lambda sim: sim.export().save("out", "d"), ConfigError, "known are: aimet-0.6.1"),
        (lambda sim: pow2quant.export(sim, "c"), ConfigError, "output: needed"),
        (lambda sim: pow2quant.ptq(network(), X), ConfigError, "quantize(model, data)"),
    ],
)
def test_everything_else_is_one_line(
    act: Callable[[Any], Any], error: type[Exception], expected: str, sim: pow2quant.Simulated
) -> None:
    with pytest.raises(error) as raised:
        act(sim)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
