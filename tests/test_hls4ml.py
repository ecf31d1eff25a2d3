"""Networks as hls4ml projects: their C simulation gives the bits of the simulation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from pow2quant import plugins, simulate, targets
from pow2quant.adapters import onnx_qdq
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.errors import UnsupportedModelError
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation.agreement import compare
from tests.target_networks import Maps, Signal

pytest.importorskip("hls4ml")
if shutil.which("g++") is None:
    pytest.skip("g++ is not installed", allow_module_level=True)


class Mean(nn.Module):
    """One mean over whole maps of two dimensions."""

    shape = (2, 4, 4)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).mean((2, 3)))


NETWORKS = {"Maps": Maps, "Signal": Signal, "Mean": Mean}


def quantized(network, rounding=None):
    torch.manual_seed(0)
    x = torch.randn(64, *network.shape)
    plan = plan_of(with_values(RunConfig(), {"target": "hls4ml"}))
    target = replace(plan.target, rounding=rounding or targets.Roundings())
    sim = simulate(network().eval(), x[:1], replace(plan, target=target))
    sim.calibrate([x])
    return sim, sim.export(x[:1]), x


def agreement(sim, artifact, x, folder):
    onnx_qdq.export_qdq(artifact, folder)
    found = plugins.resolve("validators", "hls4ml")(folder / "model.onnx")
    return compare(simulation_executor(sim, "custom", torch.device("cpu")), found, [[x.numpy()]], artifact, proof=True)[
        0
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_c_simulation_gives_the_bits_of_the_simulation(network, tmp_path):
    found = agreement(*quantized(NETWORKS[network]), tmp_path)
    assert found.differing == 0, found.first_diverging
    assert found.claim == "observed on 64 inputs"


def test_other_rounding_is_refused(tmp_path):
    _, artifact, _ = quantized(Maps, targets.Roundings(sums="floor"))
    with pytest.raises(UnsupportedModelError, match="does not round half to even"):
        plugins.resolve("exporters", "hls4ml")(artifact, tmp_path / "hls4ml")


def test_a_project_compiles_and_compares_itself(tmp_path):
    _, artifact, _ = quantized(Maps)
    model = onnx_qdq.export_qdq(artifact, tmp_path)
    folder = plugins.resolve("exporters", "hls4ml")(artifact, tmp_path / "hls4ml")
    command = [sys.executable, "compare.py", str(model)]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout) == (0, "0 of 320 elements differ\n"), made.stderr


@pytest.mark.parametrize(
    ("network", "target", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "hls4ml", "a grouped convolution"),
        (nn.Conv2d(4, 4, 3, dilation=2), "hls4ml", "a dilated convolution"),
        (nn.MaxPool2d(3, 2, 1), "hls4ml", "a maximum with padding"),
        (nn.Sigmoid(), "hls4ml", "table is not written to hls4ml"),
        (nn.Conv2d(4, 4, 3), "onnxruntime", "a zero point; hls4ml has none"),
    ],
)
def test_what_is_not_written_is_named(network, target, reason, tmp_path):
    x = torch.randn(4, 4, 8, 8)
    plan = plan_of(with_values(RunConfig(), {"target": target}))
    sim = simulate(nn.Sequential(nn.Conv2d(4, 4, 1), network).eval(), x[:1], plan)
    sim.calibrate([x])
    with pytest.raises(UnsupportedModelError, match=reason):
        plugins.resolve("exporters", "hls4ml")(sim.export(x[:1]), tmp_path)
