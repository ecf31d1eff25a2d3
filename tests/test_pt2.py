"""A network as a plain torch program, and as an mlpackage made of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pow2quant import plugins, simulate, targets
from pow2quant.adapters import onnx_qdq
from pow2quant.adapters.float_ops import to_float_ops
from pow2quant.config import RunConfig, plan_of
from pow2quant.errors import ConfigError, UnsupportedModelError
from pow2quant.frontends.onnx.network import read_network
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation.agreement import compare
from tests.target_networks import NETWORKS

LOADED_ALONE = """
import sys
sys.modules["pow2quant"] = None
import numpy, torch
x, y = (torch.from_numpy(numpy.load(name)) for name in sys.argv[2:])
with torch.no_grad():
    print(int((torch.export.load(sys.argv[1]).module()(x) != y).sum()))
"""


def quantized(network, rounding=None, **options):
    torch.manual_seed(0)
    x = torch.randn(16, *NETWORKS[network].shape)
    plan = plan_of(RunConfig())
    target = replace(plan.target, name="mine", rounding=rounding or targets.Roundings(), **options)
    sim = simulate(NETWORKS[network]().eval(), x[:1], replace(plan, target=target))
    sim.calibrate([x])
    return sim, sim.export(x[:1]), x


def test_executorch_refuses_a_sum_that_it_would_round_otherwise(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), Summed()).eval()
    x = torch.randn(8, 1, 6, 6)
    sim = simulate(network, x[:1], replace(plan_of(RunConfig()), target=targets.load("executorch")))
    sim.calibrate([x])
    with pytest.raises(
        UnsupportedModelError, match="rounds a sum over a dimension half_even, target executorch half_up"
    ):
        plugins.resolve("exporters", "executorch")(sim.export(x[:1]), tmp_path)
    assert not list(tmp_path.iterdir())


class Summed(nn.Module):
    def forward(self, x):
        return x.sum(3)


def agreement(sim, artifact, x, folder):
    onnx_qdq.export_qdq(artifact, folder)
    executors = plugins.resolve("validators", "pt2")(folder / "model.onnx")
    return compare(simulation_executor(sim, "custom", torch.device("cpu")), executors, [[x.numpy()]], artifact)[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_torch_program_gives_the_bits_of_the_simulation(network, tmp_path):
    sim, artifact, x = quantized(network)
    found = agreement(sim, artifact, x, tmp_path)
    assert (found.differing, found.claim) == (0, "observed on 16 inputs")


class Named(nn.Module):
    """Features, and the row of a table that an integer names."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x, row):
        return self.layer(self.table(row) + x)


class Attending(nn.Module):
    """Attention turns samples and places, and truth values say what it reads."""

    def __init__(self):
        super().__init__()
        self.attention, self.layer = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, hidden):
        return self.layer(self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(
    ("network", "batch"),
    [
        (Named, (torch.randn(8, 6), torch.arange(8))),
        (Attending, (torch.randn(8, 5, 8), torch.arange(40).view(8, 5) % 5 > torch.arange(8)[:, None] % 4)),
    ],
)
def test_integers_and_truth_values_are_inputs(network, batch, tmp_path):
    sim = simulate(network().eval(), batch, plan_of(RunConfig()))
    sim.calibrate([batch])
    artifact = sim.export(batch)
    onnx_qdq.export_qdq(artifact, tmp_path)
    executors = plugins.resolve("validators", "pt2")(tmp_path / "model.onnx")
    reference = simulation_executor(sim, "custom", torch.device("cpu"))
    assert compare(reference, executors, [[x.numpy() for x in batch]], artifact)[0].differing == 0


def test_the_file_needs_torch_alone(tmp_path):
    sim, artifact, x = quantized("Everything")
    file = plugins.resolve("exporters", "pt2")(artifact, tmp_path, batch=16)
    with torch.no_grad():
        np.save(tmp_path / "y.npy", sim.model(x).numpy())
    np.save(tmp_path / "x.npy", x.numpy())
    command = [sys.executable, "-c", LOADED_ALONE, file, tmp_path / "x.npy", tmp_path / "y.npy"]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert found.stdout.split() == ["0"], found.stderr


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_float_operations_keep_the_bits_at_every_width(bits):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softmax(1), torch.nn.Conv2d(4, 2, 1)).eval()
    values = plan_of(RunConfig())
    plan = replace(values, output=replace(values.output, bits=bits), input=replace(values.input, bits=bits))
    sim = simulate(network, x[:1], plan)
    sim.calibrate([x])
    model = to_float_ops(sim.export(x[:1]))
    onnx.checker.check_model(model, full_check=True)
    with torch.no_grad():
        assert int((read_network(model)(x) != sim.model(x)).sum()) == 0


def test_what_the_format_cannot_say_is_named(tmp_path):
    _, artifact, _ = quantized("Everything", targets.Roundings(sums="half_up"))
    for form in ("pt2", *(["coreml"] if find_spec("coremltools") else [])):
        with pytest.raises(UnsupportedModelError, match="target mine does not round half to even"):
            plugins.resolve("exporters", form)(artifact, tmp_path)
    with pytest.raises(ConfigError, match="batch: 0 is not legal"):
        plugins.resolve("exporters", "pt2")(quantized("Pools")[1], tmp_path, batch=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_mlpackage_holds_every_scale(network, tmp_path):
    pytest.importorskip("coremltools")
    from pow2quant.runs.coreml import scales

    _, artifact, _ = quantized(network)
    folder = plugins.resolve("exporters", "coreml")(artifact, tmp_path / "out")
    parameters = {tensor.name for tensor in artifact.model.graph.initializer}
    activations = [e for name, e in artifact.encodings.items() if name not in parameters]
    found = list(scales(folder / "model.mlpackage"))
    assert sorted(found) == sorted((float(e.scale), float(e.scale)) for e in activations)
