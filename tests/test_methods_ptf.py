"""Power-of-two factors: the equation by hand, which streams, the same bits in float, and in every executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import DataError
from pow2quant.frontends import modules as m
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.methods.ptf import Ptf, squared_errors, streams
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation import c99, engine, ort
from tests.backends import BACKENDS


class Uneven(nn.Module):
    """Tokens of a convolution and a class token, two blocks of an RMSNorm and a LayerNorm; channels differ by 64."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(2, 16, 2, 2), nn.Parameter(torch.randn(1, 1, 16))
        self.place, self.first, self.second = nn.Parameter(torch.randn(1, 5, 16)), nn.RMSNorm(16), nn.LayerNorm(16)
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        with torch.no_grad():
            for parameter in (self.patches.weight, self.patches.bias, self.a.weight, self.a.bias, self.b.weight):
                assert parameter is not None
                parameter[::4] *= 64
            self.token[..., ::4] *= 64
            self.place[..., ::4] *= 64
            for norm in (self.first, self.second):
                norm.weight[::4] /= 64

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        x = x + self.a(self.first(x))
        x = x + self.b(torch.relu(self.second(x)))
        return self.head(self.second(x)[:, 0])


def uneven() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Uneven().eval(), [torch.randn(32, 2, 4, 4) for _ in range(2)]


def test_errors_by_hand() -> None:
    """The whole tensor has 3 steps of 4; with most = 2, s is 1: shift 0 clips the first channel to 3."""
    x = torch.tensor([[12.0, 1.0], [9.0, 2.0], [4.0, 3.0]])
    assert squared_errors(x, 2, 2).tolist() == [[9**2 + 6**2 + 1, 0], [6**2 + 3**2, 2], [1, 1 + 4 + 1]]


def test_a_vision_transformer_has_one_stream() -> None:
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=4
    )
    (stream,) = streams(prepare(model.eval(), torch.randn(2, 3, 8, 8)))
    assert len(stream.norms) == 5
    assert len(stream.writers) == 7, "the convolution, class token, position embedding and two layers of each block"


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_stream_that_begins_with_the_input_or_feeds_layers_stays(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=norm_first).eval()
    assert not streams(prepare(model, torch.randn(2, 3, 8)))


def test_float_computes_the_same_bits_and_no_data_are_an_error() -> None:
    model, batches = uneven()
    network = prepare(model, batches[0])
    before = network(batches[1])
    assert before.abs().max() > 0.1
    with pytest.raises(DataError, match="calibration data are empty"):
        Ptf().rewrite(network, [])
    network = Ptf().rewrite(network, batches)
    assert torch.equal(network(batches[1]), before)
    norms = [module for module in network.modules() if isinstance(module, m.ShiftedNorm)]
    shifts = [module.get_buffer("shifts") for module in norms]
    assert all(torch.equal(s, shifts[0]) for s in shifts)
    assert shifts[0][::4].min() > shifts[0].reshape(4, 4)[:, 1:].max()
    again = Ptf().rewrite(network, batches)
    assert torch.equal(again(batches[1]), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_executor_computes_the_same_and_less_is_lost(backend: str, tmp_path: Path) -> None:
    model, batches = uneven()
    expected, noise = model(batches[1]).detach(), []
    for most in (0, 6):
        network = prepare(model, batches[0])
        network = Ptf(most).rewrite(network, batches) if most else network
        sim = simulate(network, batches[0], QuantPlan.default(), backend)
        sim.calibrate(batches)
        noise.append(float((sim.model(batches[1]) - expected).detach().square().sum()))
    artifact = sim.export(batches[0])
    assert certify(artifact).proved, certify(artifact).sentence
    x = torch.randn(200, 2, 4, 4).numpy()
    found = simulation_executor(sim.simulation, backend, torch.device("cpu")).run([x])[0]
    path = onnx_qdq.export_qdq(artifact, tmp_path)
    program = lower(onnx_qdq.from_qdq(onnx_qdq.load(path)))
    for executor in (*ort.executors(path), engine.executor(program), c99.executor(program)):
        assert np.array_equal(executor.run([x])[0], found), executor.name
    assert noise[1] < noise[0] / 4
