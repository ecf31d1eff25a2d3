"""Operations that do nothing are dropped by preparation, and only these; such networks are proved."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pow2quant import QuantPlan, TensorSpec, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import ConfigError
from pow2quant.integer.certificate import certify
from pow2quant.validation import ort

SHAPE = (4, 6, 6)
X = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """A convolution, a function, and a convolution."""

    def __init__(self, function):
        super().__init__()
        self.a, self.function, self.b = nn.Conv2d(4, 4, 1), function, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


IDLE = {
    "times one": lambda x: x * 1.0,
    "one times": lambda x: torch.ones(()) * x,
    "plus zero": lambda x: x + 0,
    "minus zero": lambda x: x - 0.0,
    "by one": lambda x: x / 1,
    "several": lambda x: (x + 0.0) * 1 - 0,
    "to the first": lambda x: x**1,
    "expand": lambda x: x.expand(-1, *SHAPE),
    "the same shape": lambda x: x.reshape(len(x), *SHAPE),
    "there and back": lambda x: x.flatten(1).reshape(len(x), *SHAPE),
    "there and back by steps": lambda x: x.flatten(2).unsqueeze(1).flatten(1).view(-1, *SHAPE),
    "all of it": lambda x: x[:, 0:4, :, :],
    "every place": lambda x: x[:, [0, 1, 2, 3]],
    "no padding": lambda x: F.pad(x, (0, 0, 0, 0)),
    "no padding with a value": lambda x: F.pad(x, (0, 0), value=1.0),
    "transposed twice": lambda x: x.transpose(1, 3).transpose(1, 3),
    "permuted back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "permuted round": lambda x: x.permute(0, 2, 3, 1).permute(0, 2, 3, 1).permute(0, 2, 3, 1),
    "reshaped between": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 36, 4).reshape(-1, 6, 6, 4).permute(0, 3, 1, 2),
    "windows of one": lambda x: F.max_pool2d(F.avg_pool2d(x, 1), 1, 1),
    "enlarged once": lambda x: F.interpolate(x, scale_factor=1),
    "to its size": lambda x: F.interpolate(x, size=(6, 6), mode="bilinear"),
    "mean of one": lambda x: x.unsqueeze(1).mean(1, keepdim=True).squeeze(1),
    "masked nowhere": lambda x: x.masked_fill(torch.zeros(6, 6, dtype=torch.bool), 5.0),
}

ACTIVE = {
    "half": lambda x: x * 0.5,
    "plus a little": lambda x: x + 1e-3,
    "mirrored": lambda x: -(x * 1.0),
    "turned": lambda x: x.permute(0, 1, 3, 2).reshape(len(x), *SHAPE),
    "cut": lambda x: F.pad(x[:, :, 1:], (0, 0, 1, 0)),
    "reversed": lambda x: x[:, [3, 2, 1, 0]],
    "other windows": lambda x: F.pad(F.max_pool2d(x, 2, 1), (0, 1, 0, 1)),
    "every second": lambda x: F.interpolate(F.max_pool2d(x, 1, 2), scale_factor=2),
    "permuted on": lambda x: x.permute(0, 3, 1, 2).reshape(-1, 36, 4).reshape(-1, 6, 6, 4).permute(0, 3, 1, 2),
    "mean": lambda x: x + x.mean(1, keepdim=True),
    "masked": lambda x: x.masked_fill(torch.eye(6, dtype=torch.bool), 5.0),
}


def targets(network):
    return [str(node.target) for node in network.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_dropped(name):
    model = Around(IDLE[name]).eval()
    network = prepare(model, X)
    assert targets(network) == ["a", "b"]
    with torch.no_grad():
        torch.testing.assert_close(network(X), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVE)
def test_what_does_something_stays(name):
    model = Around(ACTIVE[name]).eval()
    network = prepare(model, X)
    assert len(targets(network)) > 2
    with torch.no_grad():
        torch.testing.assert_close(network(X), model(X), rtol=1e-5, atol=1e-6)


def test_an_idle_module_between_an_input_and_an_output_stays():
    class Same(nn.Module):
        def forward(self, x):
            return x * 1.0, F.relu(x), F.relu(x) + 0

    network = prepare(Same(), X)
    results = network(X)
    assert len(results) == 3
    assert torch.equal(results[0], X)
    assert len(set(next(n for n in network.graph.nodes if n.op == "output").args[0])) == 3


def test_a_module_of_the_user_that_does_nothing_leaves_its_place():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(1), nn.Conv2d(4, 2, 1))
    network = prepare(nn.Sequential(model), X)
    assert targets(network) == ["0.0", "0.2"]
    assert isinstance(network.get_submodule("0")[1], nn.Identity)


def test_an_override_of_a_dropped_module_is_no_error():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(self.a(x) * 1.0)

    network = prepare(Net(), X)
    plan = replace(QuantPlan.default(), overrides=(("scale", {"output": TensorSpec(8, False, range="minmax")}),))
    simulate(network, X, plan).calibrate([X])
    with pytest.raises(ConfigError, match=r"quantization\.overrides\.scales: the prepared network has no such module"):
        simulate(network, X, replace(plan, overrides=(("scales", None),)))


@pytest.mark.parametrize("name", ["times one", "plus zero", "expand", "permuted back", "there and back"])
@pytest.mark.parametrize("where", ["in front of a concat", "behind the input"])
def test_such_networks_are_proved_and_agree(name, where):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(8 if where.endswith("concat") else 4, 4, 1)

        def forward(self, x):
            if where.endswith("concat"):
                return self.b(torch.cat([IDLE[name](self.a(x)), F.relu(x)], 1))
            return self.b(IDLE[name](x))

    torch.manual_seed(0)
    sim = simulate(prepare(Net(), X), X)
    sim.calibrate([X])
    artifact = sim.export(X)
    assert certify(artifact).proved
    model = onnx_qdq.to_qdq(artifact)
    batches = list(ort.random_batches(model, 32))
    for batch in batches:
        plain, optimized = (make(model).run(batch)[0] for make in (ort.plain, ort.optimized))
        assert (plain == optimized).all()
        with torch.no_grad():
            assert (sim.model(torch.from_numpy(batch[0])).numpy() == plain).all()
