"""esp-ppq's simulation of ESP-DL gives the bits of the simulation of its targets, and its files hold the network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pow2quant import plugins, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.errors import OutputError, UnsupportedModelError
from pow2quant.runs import espdl
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation.agreement import compare
from tests.target_networks import Sums

pytest.importorskip("esp_ppq")


def quantized(target):
    torch.manual_seed(0)
    x = torch.randn(64, *Sums.shape)
    sim = simulate(Sums().eval(), x[:1], plan_of(with_values(RunConfig(), {"target": target})))
    sim.calibrate([x])
    return sim, sim.export(x[:1]), x


def agreement(target, folder):
    sim, artifact, x = quantized(target)
    onnx_qdq.export_qdq(artifact, folder)
    found = plugins.resolve("validators", "esp-ppq")(folder / "model.onnx")
    return compare(simulation_executor(sim, "custom", torch.device("cpu")), found, [[x.numpy()]], artifact, proof=True)


@pytest.mark.parametrize(("name", "chip"), [("esp32-p4", "esp32p4"), ("esp32-s3", "esp32s3")])
def test_the_simulation_of_a_chip_gives_the_bits_of_its_target(name, chip, tmp_path):
    (found,) = agreement(name, tmp_path)
    assert found.executor == f"esp-ppq ({chip})"
    assert found.differing == 0, found.first_diverging
    assert found.claim == "observed on 64 inputs"


def test_a_zero_point_is_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"x: ESP-DL has signed codes with zero point 0"):
        agreement("onnxruntime", tmp_path)


@pytest.mark.parametrize("name", ["esp32-p4", "esp32-s3"])
def test_a_file_holds_the_network_and_what_the_chip_has_to_give(name, tmp_path):
    sim, artifact, _ = quantized(name)
    found = espdl.Content(espdl.export_espdl(artifact, tmp_path).read_bytes())
    table, output = artifact.encodings, artifact.model.graph.output[0].name
    x = table["x"].dequantize(found.tested["x"].reshape(1, 16, 16, 3).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = sim.model(torch.from_numpy(x)).numpy()
    assert np.array_equal(table[output].dequantize(found.tested[output].reshape(1, -1)), expected)


def test_a_file_that_holds_another_network_is_named(tmp_path, monkeypatch):
    _, artifact, _ = quantized("esp32-p4")
    scales = {name: replace(e, scale=e.scale * 2) for name, e in artifact.encodings.items() if name == "last.output"}
    monkeypatch.setattr(espdl.esp_ppq.File, "_encodings", lambda file, graph: file.network.encodings | scales)
    with pytest.raises(OutputError, match=r"last\.output: the file, read back, has the exponents"):
        espdl.export_espdl(artifact, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_shift_to_the_left_is_named(tmp_path):
    _, artifact, _ = quantized("esp32-p4")
    output = artifact.encodings["last.output"]
    artifact.encodings["last.output"] = replace(output, scale=output.scale / 2**12)
    with pytest.raises(UnsupportedModelError, match=r"last\.output: ESP-DL shifts to the right only"):
        espdl.export_espdl(artifact, tmp_path)
