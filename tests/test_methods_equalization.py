"""Equalization: the equation by hand, what is tied together, and that a float network does not notice."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant import QuantPlan, datasets, models, prepare, simulate
from pow2quant.backends import conformance
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import DataConfig
from pow2quant.errors import DataError
from pow2quant.methods.alignment import Align
from pow2quant.methods.equalization import (
    Equalize,
    absorb,
    absorbed,
    bounds,
    factors,
    groups,
    normals,
    pairs,
    rows,
    scale,
)


def images(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Uneven(nn.Module):
    """(N, 3, 8, 8) -> (N, 5): ReLU6 around a depthwise layer, a residual stream; ranges that differ a thousandfold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.grouped, self.up = nn.Conv2d(16, 8, 1, groups=2), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            wild = 10 ** torch.linspace(-1.5, 1.5, 16)[torch.randperm(16)]
            self.depthwise.weight *= wild.view(-1, 1, 1, 1)
            self.depthwise.bias *= wild
            self.a.weight /= wild.view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depthwise(F.relu(self.stem(x))))
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.up(F.max_pool2d(F.relu(self.grouped(x)), 2))).mean((2, 3)))


@pytest.fixture
def network() -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return prepare(Uneven(), images())


def test_the_factor_by_hand() -> None:
    """Ranges 4 and 1 meet at 2 with s = 2; two writers of 2 and 8 count as 4; a dead channel keeps its scale."""
    assert factors([torch.tensor([4.0, 1.0, 0.0])], [torch.tensor([1.0, 4.0, 1.0])]).tolist() == [2, 0.5, 1]
    assert factors([torch.tensor([2.0]), torch.tensor([8.0])], [torch.tensor([1.0])]).tolist() == pytest.approx([2])


def test_the_bounds_by_hand() -> None:
    """A ReLU6 is reached by 3 after division by 1/2, by 8 at once, and never by what is dead; biases bound it too."""
    low, high = bounds(torch.tensor([3.0, 8.0, 0.0]), [torch.tensor([0.5, 1.0, 0.25])], clipped=True)
    assert low.tolist() == [0.5, 1, 0.25]
    assert high.tolist() == [torch.inf, 1, torch.inf]
    low, high = bounds(torch.tensor([3.0, 8.0, 0.0]), [], clipped=False)
    assert low.tolist() == [0.375, 1, 0]
    assert high.tolist() == [torch.inf] * 3


def test_two_layers_meet_in_the_middle() -> None:
    """After eq. 11 the rows of the first layer have the ranges of the second one's columns."""
    network = prepare(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4))
    (group,) = groups(network)
    first, second = (network.get_parameter(f"{i}.weight") for i in (0, 2))
    s = factors([first.detach().abs().amax(1)], [second.detach().abs().amax(0)])
    scale(network, group, s)
    torch.testing.assert_close(first.abs().amax(1), second.abs().amax(0))


def test_groups_are_chains_and_residual_streams() -> None:
    model = models.build("torchvision:resnet18").eval()
    network = fold_batch_norm(prepare(model, torch.randn(1, 3, 64, 64)))
    found = [({str(n.target) for n in g.writers}, {str(n.target) for n in g.readers}) for g in groups(network)]
    stream = {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"}
    assert ({"conv1", "layer1.0.conv2", "layer1.1.conv2"}, stream) in found
    assert ({"layer1.0.conv1"}, {"layer1.0.conv2"}) in found
    assert len(found) == 12


def test_what_is_not_homogeneous_shared_or_concatenated_is_left_alone() -> None:
    """The conformance suite's network has Hardswish, Sigmoid, products, a tie and a module that is called twice."""
    network = copy.deepcopy(conformance.prepared())
    found = [({str(n.target) for n in g.writers}, {str(n.target) for n in g.readers}) for g in groups(network)]
    assert found == [({"stem.0", "side"}, {"depthwise", "tied"}), ({"up"}, {"fc"})]


def test_the_float_network_does_not_notice(network: fx.GraphModule) -> None:
    before = network(images(32))
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    after = Equalize().rewrite(network, [images(32)])(images(32))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    depthwise = rows(network, next(n for n in network.graph.nodes if n.target == "depthwise")).abs().flatten(1).amax(1)
    old = weights["depthwise.weight"].abs().flatten(1).amax(1)
    assert depthwise.max() / depthwise.min() < 0.2 * old.max() / old.min()


def test_per_tensor_weights_gain_by_it() -> None:
    """The embedded network, its channels scaled apart a thousandfold where it does not notice, at 8 bits per tensor."""
    data = datasets.load(DataConfig())
    network = fold_batch_norm(prepare(models.trained_digits_cnn(), torch.rand(2, 1, 8, 8)))
    for group in groups(network):
        if not group.clips:
            channels = network.get_parameter(f"{group.writers[0].target}.bias").shape[0]
            scale(network, group, 10 ** torch.linspace(-1.5, 1.5, channels))
    batches, test = [x for x, _ in islice(data.calibration, 4)], torch.cat([x for x, _ in data.test])
    expected, errors = network(test), []
    for chosen in (network, Equalize().rewrite(copy.deepcopy(network), batches)):
        sim = simulate(chosen, batches[0], QuantPlan.default(8, 8, per_tensor=True))
        sim.calibrate(batches)
        with torch.no_grad():
            errors.append(float((sim.model(test) - expected).square().mean()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize(("outputs", "groups_of"), [(6, 1), (4, 2)])
def test_volumes_are_scaled_as_images_are(outputs: int, groups_of: int) -> None:
    """A transposed convolution has its input channels first in three dimensions, too."""
    torch.manual_seed(0)
    layers = (nn.Conv3d(2, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, outputs, 2, 2, groups=groups_of), nn.ReLU())
    model, x = nn.Sequential(*layers, nn.Conv3d(outputs, 3, 1)), torch.randn(4, 2, 5, 5, 5)
    for method in (Equalize(), Align(rounds=1)):
        network = prepare(model.eval(), x)
        before, weights = network(x), network.get_parameter("0.weight").detach().clone()
        parameters = {"plan": QuantPlan.default(4, 8)} if isinstance(method, Align) else {}
        after = method.rewrite(network, [x], **parameters)(x)
        assert (after - before).abs().max() <= 1e-4 * before.abs().max()
        assert torch.equal(network.get_parameter("0.weight"), weights) == (groups_of > 1)


def test_a_nearly_dead_channel_does_not_blow_up() -> None:
    """Weights of 1e-9 beside a bias of 0.5: eq. 11 alone would make an activation of thousands of it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].weight[2] = 1e-9
        model[0].bias[2] = 0.5
    network = prepare(model, images())
    largest = network.get_submodule("1")(network.get_submodule("0")(images())).max()
    Equalize().rewrite(network, [images()])
    assert network.get_submodule("1")(network.get_submodule("0")(images())).max() < 2 * largest


def test_no_data_is_an_error(network: fx.GraphModule) -> None:
    with pytest.raises(DataError, match="calibration data are empty"):
        Equalize().rewrite(network, [])


def test_the_absorbed_constant_by_hand() -> None:
    """Mean 10 and deviation 1: 7 is hardly ever undercut; mean 2 and deviation 1: nothing is left."""
    assert absorbed(torch.tensor([10.0, 2.0]), torch.tensor([1.0, 1.0])).tolist() == [7, 0]


def test_absorption_by_hand() -> None:
    """y = 2 relu(x + 10) + 1 = 2 relu(x + 3) + 15 for every x >= -3 (eq. 15 and 16 with c = 7)."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (1.0, 10.0, 2.0, 1.0), strict=True):
            parameter.fill_(value)
    network = prepare(model, torch.zeros(1, 1))
    (group,) = pairs(network)
    absorb(network, group, torch.tensor([7.0]))
    assert [p.item() for p in network.parameters()] == [1, 3, 2, 15]
    x = torch.tensor([[-3.0], [0.0], [5.0]])
    assert network(x).tolist() == model(x).tolist() == [[15], [21], [31]]


def test_a_constant_goes_only_where_it_is_read_as_such(network: fx.GraphModule) -> None:
    """Not into zero padding, as that of `b`; through the mean over the image, into the linear layer."""
    found = {str(g.writers[0].target): [str(n.target) for n in g.readers] for g in pairs(network)}
    assert found == {"depthwise": ["a"], "b": ["grouped"], "up": ["head"]}


def test_absorption_changes_next_to_nothing_and_takes_off_the_bias() -> None:
    """Biases far above the deviation; a grouped reader; a ReLU6 that the third channel reaches, the fourth nearly."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Flatten())
        model[0].weight.div_(10)
        model[0].bias.copy_(torch.tensor([2.0, 2.5, 6.5, 5.9]))
    network = prepare(model, images())
    before = network(images(64))
    plain = Equalize().rewrite(copy.deepcopy(network), [images(64)])
    Equalize(absorb_biases=True).rewrite(network, [images(64)])
    taken = plain.get_parameter("0.bias") - network.get_parameter("0.bias")
    assert (taken[:2] > 1).all()
    assert (taken[2:] == 0).all()
    assert (network(images(64)) - before).square().mean() < 1e-4 * before.square().mean()


def test_batch_norm_says_what_a_layer_computes_and_otherwise_the_data() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[1].weight.fill_(2.0)
        model[1].bias.fill_(9.0)
    network = fold_batch_norm(prepare(model.eval(), images()))
    first, last = [n for n in network.graph.nodes if n.target in ("0", "3")]
    (mean, deviation), (of_data, deviation_of_data) = normals(network, [first, last], [images(16), images(8, 1)])
    assert mean.tolist() == [9] * 4
    assert deviation.tolist() == [2] * 4
    y = torch.cat([network(images(16)), network(images(8, 1))]).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(of_data, y.mean(1))
    torch.testing.assert_close(deviation_of_data, y.std(1, correction=0))


def test_layers_that_are_called_twice_keep_their_constants() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = (self.head(torch.relu(self.conv(part))) for part in (x, -x))
            return first + second

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Twice().eval()
    nn.init.constant_(model.conv.bias, 3)
    network = prepare(model, images())
    assert pairs(network) == []
    before = network(images(8))
    Equalize(absorb_biases=True).rewrite(network, [images(8)])
    assert torch.allclose(network(images(8)), before, atol=1e-5)
