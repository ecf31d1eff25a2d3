"""esp-ppq's simulation of ESP-DL gives the bits of the simulation of its targets."""

from __future__ import annotations

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

pytest.importorskip("esp_ppq")


class Sums(nn.Module):
    """Layers, a depthwise and a transposed one among them, a sum of two scales, a maximum, a mean, a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up, self.pool, self.last = nn.ConvTranspose2d(6, 6, 3, 2), nn.MaxPool2d(2), nn.Linear(6, 5)
        nn.init.uniform_(self.depthwise.weight, -1, 1)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.last(self.pool(self.up(torch.relu(y + self.depthwise(y)))).mean((2, 3)))


def agreement(target, folder):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 16, 16)
    plan = plan_of(with_values(RunConfig(), {"target": target.name}))
    sim = simulate(Sums().eval(), x[:1], replace(plan, target=target))
    sim.calibrate([x])
    artifact = sim.export(x[:1])
    onnx_qdq.export_qdq(artifact, folder)
    found = plugins.resolve("validators", "esp-ppq")(folder / "model.onnx")
    return compare(simulation_executor(sim, "custom", torch.device("cpu")), found, [[x.numpy()]], artifact, proof=True)


@pytest.mark.parametrize(("name", "chip"), [("esp32-p4", "esp32p4"), ("esp32-s3", "esp32s3")])
def test_the_simulation_of_a_chip_gives_the_bits_of_its_target(name, chip, tmp_path):
    (found,) = agreement(targets.load(name), tmp_path)
    assert found.executor == f"esp-ppq ({chip})"
    assert found.differing == 0, found.first_diverging
    assert found.claim == "observed on 64 inputs"


@pytest.mark.parametrize("name", ["esp32-p4", "esp32-s3"])
@pytest.mark.parametrize(("kind", "node"), [("products", "relu"), ("averages", "mean")])
def test_a_rule_that_is_wrong_is_noticed_where_it_stands(name, kind, node, tmp_path):
    right = targets.load(name)
    (found,) = agreement(replace(right, rounding=replace(right.rounding, **{kind: "floor"})), tmp_path)
    assert found.differing
    assert found.first_diverging.node == node


def test_a_zero_point_is_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"x: ESP-DL has signed codes with zero point 0"):
        agreement(targets.DEFAULT, tmp_path)
