"""Range alignment: two layers by hand, the gains against differentiation, and that a float network does not notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pow2quant
from pow2quant import QuantPlan, RunConfig, datasets, models, prepare, runs, simulate
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.backends.placement import Placement, place
from pow2quant.config import DataConfig, TensorSpec, with_values
from pow2quant.errors import DataError
from pow2quant.methods.alignment import Align, Aligned
from pow2quant.methods.equalization import groups
from pow2quant.methods.noise import LayerNoise, TensorNoise, matrix, measure
from tests.backends import BACKENDS
from tests.kinds import QUICK

W4 = TensorSpec(4, True, True)
WEIGHTS_ONLY = QuantPlan(W4, None, None, None)


def images(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Streams(nn.Module):
    """(N, 3, 8, 8) -> (N, 5): a residual stream that a depthwise layer and pooling read, a ReLU6, a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b, self.depthwise = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped, self.up = nn.Conv2d(8, 6, 1, groups=2), nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu6(self.grouped(F.relu(self.depthwise(F.max_pool2d(x, 2)))))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


def streams(seed: int = 0) -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return prepare(Streams(), images())


def two_layers() -> fx.GraphModule:
    """Rows (7, 3) sqrt(2) and (6, 5) 2^(1/4), read by the row (5 / sqrt(2), 7 / 2^(1/4)): on no grid of 2^k."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7.0, 3.0], [6.0, 5.0]]) * torch.tensor([[2**0.5], [2**0.25]]))
        model[2].weight.copy_(torch.tensor([[5.0 / 2**0.5, 7.0 / 2**0.25]]))
    return prepare(model, torch.rand(4, 2))


def test_two_layers_by_hand() -> None:
    """Divided by sqrt(2) and 2^(1/4), or by twice these, every weight is an integer: the estimated error is 0."""
    network = two_layers()
    data = [torch.rand(64, 2, generator=torch.Generator().manual_seed(0))]
    Align().rewrite(network, data, WEIGHTS_ONLY)
    sim = simulate(network, data[0], WEIGHTS_ONLY)
    table = sim.calibrate(data)
    written, read = (network.get_parameter(f"{i}.weight").detach() for i in (0, 2))
    for weight, name in ((written, "0.weight"), (read, "2.weight")):
        codes = weight / torch.tensor(table[name].scale.tolist())[:, None]
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert read[0, 0] / read[0, 1] == pytest.approx(5 / 7)


def test_the_error_of_a_row_by_hand() -> None:
    """Row (7.5, 1) goes to (7, 1) at scale 1, to (8, 0) at 2; inputs of variance 4 and 1, covariance 1; gain 9."""
    noise = LayerNoise(W4, True, torch.tensor([9.0]), torch.tensor([[[4.0, 1.0], [1.0, 1.0]]]))
    weight = torch.tensor([[[[7.5], [1.0]]]])
    one, two = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    assert noise.errors(weight, one).tolist() == [[9 * 4 * 0.25]]
    assert noise.errors(weight, two).tolist() == [[9 * (4 * 0.25 + 1 - 2 * 0.5)]]
    assert noise.errors_by_column(weight, two).tolist() == [[[9 * 4 * 0.25, 9 * 1]]]
    scale, error = noise.least(weight)
    assert scale.tolist() == [[2]]
    assert error.tolist() == [[9]]
    assert noise.least(weight, expected=True)[0].tolist() == [[1]]


def test_taps_that_see_the_same_share_their_errors() -> None:
    """Errors of 0.25 and -0.25 cancel where both taps see one value; where these are independent they do not."""
    weight = torch.tensor([[[[6.75, 1.25]]]])
    for shared, expected in ((1.0, 0.0), (0.0, 0.125)):
        noise = LayerNoise(W4, True, torch.ones(1), torch.tensor([[[1.0, shared], [shared, 1.0]]]))
        assert noise.errors(weight, torch.tensor([[1.0]])).item() == expected
        assert noise.errors_by_column(weight, torch.tensor([[1.0]])).item() == expected


def test_covariances_follow_a_division_of_the_input() -> None:
    """Of two channels with two taps, the first divided by 2."""
    noise = LayerNoise(W4, True, torch.ones(1), torch.ones(1, 4, 4))
    noise.divide_input(torch.tensor([2.0, 1.0]))
    assert noise.covariance[0].tolist() == [[0.25, 0.25, 0.5, 0.5]] * 2 + [[0.5, 0.5, 1, 1]] * 2


def test_the_error_of_an_activation_by_hand() -> None:
    """Values 1 and 6.6 at 4 bits; behind a ReLU6 that stood at 6 and, after division by 3/4, clips at 4.5."""
    spec = TensorSpec(4, False)
    noise = TensorNoise(spec, torch.tensor([2.0]), torch.tensor([[1.0, 6.6]]))
    assert noise.encoding().scale == 0.5
    assert noise.errors(torch.tensor(1.0)).item() == pytest.approx(2 * 0.1**2 / 2, rel=1e-4)
    clipped = TensorNoise(spec, torch.tensor([2.0]), torch.tensor([[1.5, 6.6]]), torch.tensor([6.0]))
    assert clipped.errors(torch.tensor(1.0)).item() == 0
    assert clipped.errors(torch.tensor(0.75)).item() == pytest.approx(2 * 0.75**2 * 2**2 / 2), "8 is clipped to 6"


def test_headroom_is_for_values_that_calibration_did_not_see() -> None:
    """7 fills 4 bits at 1/2 without headroom; 10 % more is beyond their end, 7.5."""
    sample = torch.tensor([[1.0, 7.0]])
    noise = TensorNoise(TensorSpec(4, False), torch.tensor([2.0]), sample, headroom=1.5)
    assert noise.encoding().scale == 0.5
    assert noise.errors(torch.tensor(1.0)).item() == 2 * 3**2 / 2


def test_with_headroom_larger_inputs_saturate_less() -> None:
    network = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.rand(2, 4))
    data = torch.rand(256, 4, generator=torch.Generator().manual_seed(0))
    plan = QuantPlan(None, None, TensorSpec(8, False), None)
    errors = []
    for headroom in (1.0, 1.2):
        rewritten = Align(headroom=headroom).rewrite(copy.deepcopy(network), [data], plan)
        sim = simulate(rewritten, data, plan)
        table = sim.calibrate([data])
        largest = rewritten.get_submodule("0")(data).detach().max() * 1.1
        errors.append(float((largest - float(table["1.output"].maximum)).clamp_min(0)))
    assert errors[0] > 0
    assert errors[1] < errors[0] / 10


def test_the_gains_are_squared_derivatives() -> None:
    """Of a linear network they are known: W^T W, by column."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.fill_(1.0)  # every ReLU is open
    network = prepare(model, torch.rand(2, 3))
    (group,) = groups(network)
    batches = [torch.rand(512, 3, generator=torch.Generator().manual_seed(0))]
    plan = QuantPlan.default(4, 8)
    layers, tensors = measure(network, place(network, plan), group.tensors, batches)
    expected = model[2].weight.detach().square().sum(0)
    by_name = {str(n.target): y for n, y in layers.items()}
    torch.testing.assert_close(by_name["0"].gain, expected, rtol=0.2, atol=0)
    torch.testing.assert_close(by_name["2"].gain, torch.ones(2))
    ((node, noise),) = tensors.items()
    assert str(node.target) == "1"
    torch.testing.assert_close(noise.gain, expected, rtol=0.2, atol=0)
    torch.testing.assert_close(by_name["0"].covariance[0], batches[0].T.cov(), rtol=0.02, atol=1e-3)


def test_a_convolution_sees_patches() -> None:
    """White images: the taps' covariance is the identity, but for the zeros of the padding at the border."""
    network = prepare(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), images())
    layers, _ = measure(network, place(network, WEIGHTS_ONLY), [], [images(256)])
    covariance = next(iter(layers.values())).covariance
    assert covariance.shape == (1, 27, 27)
    torch.testing.assert_close(covariance[0].diagonal()[4::9], torch.ones(3), rtol=0.1, atol=0)
    assert covariance[0].fill_diagonal_(0).abs().max() < 0.1
    assert [tuple(matrix(network, n).shape) for n in layers] == [(1, 4, 3, 9), (1, 2, 4, 1)]


@pytest.mark.parametrize("seed", range(3))
def test_the_float_network_does_not_notice_and_the_estimate_falls(seed: int) -> None:
    network = streams(seed)
    before = network(images(32, seed))
    notes: list[float] = []

    class Notes:
        def track(self, items: range, title: str, total: int | None = None) -> range:
            return items

        def note(self, text: str) -> None:
            notes.append(float(text.rpartition(" ")[2]))

    Align(rounds=3, exact=True).rewrite(network, [images(32, seed)], QuantPlan.default(4, 4), Notes())  # type: ignore[arg-type]
    after = network(images(32, seed))
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert notes[2] <= notes[0]


def parts(plan: QuantPlan) -> Iterator[Aligned]:
    """The groups of `streams`, and what is known about their noise."""
    network = streams()
    found = groups(network)
    layers, tensors = measure(network, place(network, plan), [n for g in found for n in g.tensors], [images(32)])
    for group in found:
        yield Aligned(
            network,
            group,
            {n: layers[n] for n in group.writers},
            {n: layers[n] for n in group.readers},
            [tensors[n] for n in group.tensors if n in tensors],
        )


def test_every_factor_has_the_error_that_comes_of_it() -> None:
    """What `shared` and `separate` foretell is what the noise adds up to after the division."""
    one = torch.ones(())
    for part in parts(QuantPlan.default(4, 4)):
        other = copy.deepcopy(part)
        factor = torch.tensor(2**0.3125)
        foretold = part.shared(factor)
        other.divide(factor.expand(part.channels).clone())
        torch.testing.assert_close(other.shared(one), foretold, rtol=1e-3, atol=0)
        candidates = torch.exp2(torch.arange(-4, 5) / 4)
        foretold = part.separate(candidates, 4)
        for node, y in part.writers.items():  # per channel, so that nothing is shared
            now = torch.stack([y.least(matrix(part.network, node) / t)[1].flatten() * t**2 for t in candidates])
            foretold = foretold - now
        rest = [y.errors_by_column(w := matrix(part.network, n), y.least(w)[0]) for n, y in part.readers.items()]
        total = sum(float(e.sum()) for e in rest) + sum(float(x.errors(one).sum()) for x in part.tensors)
        assert float(foretold[4].sum()) == pytest.approx(total, rel=1e-2)


def test_one_factor_for_all_channels_has_the_same_error_an_octave_further() -> None:
    """So one octave is all that is tried. With scales that are powers of two, to the last bit."""
    for part in parts(QuantPlan.default(4, 8)):
        errors = [part.shared(torch.tensor(t)) for t in (0.5, 0.75, 1.0, 1.5, 2.0)]
        assert errors[0] == errors[2] == errors[4]
        assert errors[1] == errors[3] != errors[0]


def test_a_clipped_channel_is_scaled_where_that_costs_less_than_it_wins() -> None:
    """Some channels reach the ReLU6: with `exact` these keep their rows, otherwise some of them do not."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_()
    data = [images(64)]
    scaled = []
    for exact in (True, False):
        network = prepare(model, images())
        weight = network.get_parameter("0.weight").clone()
        Align(exact=exact).rewrite(network, data, QuantPlan.default(4, 8))
        ratio = (network.get_parameter("0.weight") / weight).flatten(1)
        scaled.append(int(((ratio - 1).abs() > 1e-3).all(1).sum()))
    assert scaled[0] < scaled[1]


@pytest.mark.parametrize(
    ("widths", "free"), [((4, 8), False), ((4, 4), False), ((4, 8), True)], ids=["w4a8", "w4a4", "free"]
)
def test_a_trained_network_gains_by_it(widths: tuple[int, int], free: bool, weights: str, digits: list[Tensor]) -> None:
    """The weights are the shipped ones; one scale per tensor is left out, because there alignment may lose."""
    plan = QuantPlan.default(*widths)
    if free:
        roles = {role: replace(getattr(plan, role), power_of_2=False) for role in ("weight", "input", "output", "bias")}
        plan = QuantPlan(**roles)
    network = fold_batch_norm(prepare(models.build("digits-cnn", weights=weights), digits[0]))
    errors = []
    for chosen in (network, Align(rounds=1).rewrite(copy.deepcopy(network), digits[:2], plan)):
        sim = simulate(chosen, digits[0], plan)
        sim.calibrate(digits[:4])
        with torch.no_grad():
            errors.append(sum(float((sim.model(x) - network(x)).square().sum()) for x in digits[4:]))
    assert errors[1] < errors[0]


def test_what_layers_read_of_wide_sums_counts_with_its_own_width() -> None:
    """With sums of 8 bits, a layer behind one reads 4: in the simulation, and where noise is weighed."""
    plan = replace(QuantPlan.default(8, 4), sums=8)

    def read(placement: Placement) -> dict[str, int]:
        return {y.module: placement.specs[y.input.name].bits for y in placement.layers if y.input is not None}

    network = Align(rounds=1).rewrite(streams(), [images(32)], plan)
    simulated = read(simulate(streams(), images(), plan).placement)
    assert read(place(network, plan)) == simulated
    assert simulated["a"] == 4


@pytest.fixture(scope="module")
def digits() -> list[Tensor]:
    return [x for x, _ in islice(datasets.load(DataConfig()).calibration, 8)]


@pytest.fixture(scope="module")
def weights() -> str:
    return str(models.DIGITS_WEIGHTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exported_networks_agree_everywhere(backend: str, weights: str, tmp_path: Path) -> None:
    values = {
        "backend": backend,
        "model.weights": weights,
        "quantization.weight.bitwidth": 4,
        "ptq.calibration_batches": 2,
        "ptq.max_eval_batches": 2,
        "ptq.methods": [
            {"equalize": {"absorb_biases": True}},
            {"align": {"rounds": 1}},
            "output_mse",
            "bias_correction",
        ],
    }
    result = runs.ptq(with_values(RunConfig(), values), tmp_path / "run")
    assert result.agrees
    assert result.report["pipeline_steps"][:3] == ["equalize", "align", "calibrate"]
    assert runs.validate(tmp_path / "run", max_batches=1).agrees


def test_no_data_is_an_error() -> None:
    with pytest.raises(DataError, match="calibration data are empty"):
        Align().rewrite(streams(), [], WEIGHTS_ONLY)


def test_a_transposed_layer_of_several_groups_is_as_many_layers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = nn.ConvTranspose2d(4, 6, 2, groups=2)
        halves = [nn.ConvTranspose2d(2, 3, 2) for _ in range(2)]
    with torch.no_grad():
        for half, weight, bias in zip(halves, whole.weight.split(2), whole.bias.split(3), strict=True):
            half.weight.copy_(weight)
            half.bias.copy_(bias)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = halves

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x[:, :2]), self.b(x[:, 2:])], 1)

    x = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(0))

    def measured(model: nn.Module) -> list[tuple[Tensor, LayerNoise]]:
        network = prepare(model, x)
        noise, _ = measure(network, place(network, WEIGHTS_ONLY), (), [x])
        return [(matrix(network, node), y) for node, y in noise.items()]

    ((weight, together),) = measured(nn.Sequential(whole))
    apart = measured(Apart())
    assert weight.shape == (2, 3, 2, 4)
    scale = torch.full((2, 3), 0.125)
    for i, (part, noise) in enumerate(apart):
        assert torch.equal(weight[i], part[0])
        own = noise.errors(part, scale[[i]])[0]
        torch.testing.assert_close(together.errors(weight, scale)[i], own)


@pytest.mark.parametrize("method", ["align", "lapq"])
def test_networks_that_give_indices(method: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(torch.relu(self.a(x))).argmax(1)

    torch.manual_seed(0)
    x = torch.randn(32, 3, 6, 6)
    result = pow2quant.quantize(Net().eval(), x.split(8), bits="w4a8", methods=method, progress=False, config=QUICK)
    assert all(found["differing"] == 0 for found in result.report["validation"])
