"""The one preparation: function preserved, names kept, clear errors for what cannot be traced."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.backends.fold import fold_batch_norm
from pow2quant.errors import ModelError, UnsupportedModelError, WeightsError
from pow2quant.frontends import modules as m
from pow2quant.frontends.operators import OPERATORS
from pow2quant.frontends.prepare import prepare
from pow2quant.models import build
from tests.preparing import same


class Functions(nn.Module):
    """Every way of writing an operation that is no module call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding="same")
        self.relu = nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.fc = nn.Linear(8, 6)
        self.tokens = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        left, right = x.chunk(2, dim=1)
        x = torch.cat([F.relu6(left + right), self.relu(left - 0.5 * right)], 1)
        x = F.pad(x, (1, 0, 1, 0)) * self.gain
        x = F.max_pool2d(x, 2) + 0.1
        x = F.interpolate(x, scale_factor=2, mode="nearest")[:, :, ::2, 1:]
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = self.fc(x.flatten(2).permute(0, 2, 1))
        x = self.tokens(F.hardswish(x)).mean(dim=1)
        return F.dropout(x, training=self.training).unsqueeze(1).squeeze(1)


def test_functions_become_modules_and_the_network_computes_the_same() -> None:
    model, x = Functions().eval(), torch.randn(3, 4, 9, 9)
    network = prepare(model, x)
    same(network, model, x)
    called = [network.get_submodule(n.target) for n in network.graph.nodes if n.op == "call_module"]
    assert {type(c) for c in called} <= set(OPERATORS)
    assert all(n.op in ("placeholder", "call_module", "output") for n in network.graph.nodes)


def test_names_are_kept_and_reused_modules_get_their_own() -> None:
    network = prepare(Functions(), torch.randn(1, 4, 9, 9))
    names = {n.target for n in network.graph.nodes if n.op == "call_module"}
    assert {"conv", "relu", "relu_1", "fc", "tokens"} <= names


def test_scoped_names_for_functions_inside_blocks() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + x.sigmoid())

    network = prepare(nn.Sequential(Block(), Block()), torch.randn(1, 3))
    assert {"0.sigmoid", "0.add", "0.relu", "1.sigmoid", "1.add", "1.relu"} <= {n.target for n in network.graph.nodes}


def test_a_reused_layer_shares_its_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).tanh())

    model, x = Twice().eval(), torch.randn(2, 5)
    network = prepare(model, x)
    same(network, model, x)
    assert network.get_submodule("fc").weight is network.get_submodule("fc_1").weight


def test_the_users_model_is_left_unchanged() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Hardswish(inplace=True)
    ).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fold_batch_norm(prepare(model, torch.randn(1, 1, 8, 8)))
    assert model.training
    assert model[2].inplace
    assert type(model[3]) is nn.Hardswish
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class OwnConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=2, padding=1)


def test_functional_layers_take_their_owners_name() -> None:
    model, x = nn.Sequential(OwnConv(), nn.ReLU()).eval(), torch.randn(2, 2, 8, 8)
    network = prepare(model, x)
    same(network, model, x)
    assert isinstance(network.get_submodule("0"), nn.Conv2d)


@pytest.mark.parametrize(("given", "wanted", "kind"), [(8, 1, m.Mean), (8, 4, nn.AvgPool2d), (2, 6, m.NearestUpsample)])
def test_adaptive_pooling_becomes_what_it_is_for_this_size(given: int, wanted: int, kind: type[nn.Module]) -> None:
    model, x = nn.Sequential(nn.AdaptiveAvgPool2d(wanted)).eval(), torch.randn(2, 3, given, given)
    network = prepare(model, x)
    same(network, model, x)
    assert type(network.get_submodule("0")) is kind


def test_arguments_with_defaults_and_several_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if mask is not None:
                x = x * mask
            return x + y, x - y

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    network = prepare(Two(), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(network(x, y), (x + y, x - y), strict=True))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Transforming(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (Branching(), UnsupportedModelError, ["test_prepare.py", "if x.sum() > 0", "move it out of forward"]),
        (Transforming(), UnsupportedModelError, ["fft", "test_prepare.py", "torch.fft.fft(x).real", "supported"]),
        (nn.Sequential(nn.FractionalMaxPool2d(2, 2)), UnsupportedModelError, ["0", "fractional_max_pool2d"]),
        (nn.Sequential(nn.Conv2d(2, 1, 3)), ModelError, ["inputs of shape (2, 1, 4, 4)"]),
    ],
)
def test_what_cannot_be_quantized_is_named(model: nn.Module, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        prepare(model, torch.randn(1, 1, 4, 4))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"1\.weight"):
        prepare(model, torch.randn(1, 3))


def test_a_functional_layer_in_a_module_that_holds_others() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Hardswish()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(F.conv2d(x, self.weight))

    model, x = nn.Sequential(Holder()).eval(), torch.randn(2, 2, 6, 6)
    network = prepare(model, x)
    same(network, model, x)
    assert {n.target for n in network.graph.nodes if n.op == "call_module"} == {"0.conv2d", "0.act"}


@pytest.mark.parametrize("model", [nn.LazyLinear(3), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))])
def test_networks_without_numbers_are_named(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"lazy|running statistics"):
        fold_batch_norm(prepare(model, torch.randn(2, 3, 4, 4)))


class Nested(nn.Module):
    """Blocks in containers, some of which vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 1)
        )
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        x = self.features(x).mean((2, 3))
        return {"none": None, "a": self.heads["a"](x), "again": self.heads["a"](x), "b": self.heads["b"](x)}


def test_containers_keep_their_type_and_their_numbers() -> None:
    network: Any = prepare(Nested().eval(), torch.randn(2, 3, 6, 6))
    assert isinstance(network.features, nn.Sequential)
    assert isinstance(network.features[4], nn.Conv2d)
    assert isinstance(network.features[3], nn.Identity)
    assert isinstance(network.heads["b"], nn.Linear)
    assert [name for name, _ in network.named_children()][:2] == ["features", "heads"]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        partial(torch.compile, backend="eager"),
        lambda net: net.half(),
        lambda net: net.to(torch.bfloat16),
        lambda net: nn.Sequential(nn.utils.parametrizations.weight_norm(net[0]), *net[1:]),
        lambda net: nn.Sequential(nn.utils.weight_norm(net[0]), *net[1:]),
        lambda net: nn.Sequential(nn.utils.parametrizations.spectral_norm(net[0]), *net[1:]),
    ],
)
def test_wrapped_networks(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(2, 3, 6, 6)
    model = wrap(copy.deepcopy(plain)).eval()
    network = prepare(model, x)
    assert {n.target for n in network.graph.nodes if n.op == "call_module"} == {"0", "1", "2"}
    with torch.no_grad():
        reference = (model.module if isinstance(model, nn.DataParallel) else model).float()(x)
    torch.testing.assert_close(network(x), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.randn(1, 3, 6, 6))])
def test_scripted_networks_are_one_clear_line(make: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"torch\.jit"):
        prepare(make(nn.Sequential(nn.Conv2d(3, 4, 3)).eval()), torch.randn(1, 3, 6, 6))


def test_exported_and_traced_networks_are_prepared(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9), nn.ReLU()).eval(), torch.randn(2, 4)
    program, wanted = torch.export.export(model, (x,)), model(x)
    for given in (program, program.module(), torch.fx.symbolic_trace(nn.Sequential(model).train())):
        torch.testing.assert_close(prepare(given, x)(x), wanted)
    torch.export.save(program, tmp_path / "m.pt2")
    (tmp_path / "m.py").write_text(
        f"import torch\n\ndef net():\n    return torch.export.load({str(tmp_path / 'm.pt2')!r})\n"
    )
    torch.testing.assert_close(build(f"{tmp_path / 'm.py'}:net")(x), wanted)


def test_buffers_may_hold_minus_infinity_as_masks_do() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    prepare(model, torch.randn(2, 4))
    model.mask[0, 0] = torch.inf
    with pytest.raises(WeightsError, match="mask"):
        prepare(model, torch.randn(2, 4))


def test_dictionaries_and_keyword_arguments_are_inputs() -> None:
    class Named(nn.Module):
        def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
            return left - 2 * right

    class Mapped(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["left"] - 2 * batch["right"]

    batch = {"left": torch.randn(2, 3), "right": torch.randn(2, 3)}
    for model in (Named(), Mapped()):
        network = prepare(model, batch)
        torch.testing.assert_close(network(batch["left"], batch["right"]), batch["left"] - 2 * batch["right"])


def test_a_network_that_cannot_be_captured_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedModelError):
        prepare(Branching(), torch.randn(1, 3))
    assert capfd.readouterr() == ("", "")


def test_loops_over_the_batch_are_named() -> None:
    class Looping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row.tanh() for row in x])

    with pytest.raises(UnsupportedModelError, match="depend on the batch size"):
        prepare(Looping(), torch.randn(2, 3))


def test_rounding_that_grows_through_the_network_is_not_a_difference() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh((self.conv(x).sigmoid() - 0.5) * 3e6)

    model, x = Growing().eval(), torch.randn(2, 3, 4, 4)
    network = prepare(model, x)
    assert next(network.parameters()).dtype == torch.float32


def test_weights_that_are_computed_keep_the_layers_name() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(input, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)

    model, x = nn.Sequential(Standardized(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    network = prepare(model, x)
    same(network, model, x)
    assert type(network.get_submodule("0")) is nn.Conv2d


def test_names_that_are_no_python() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"class": nn.Linear(3, 3), 'a "b"': nn.Linear(3, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.parts['a "b"'](self.parts["class"](x))

    model, x = Named().eval(), torch.randn(2, 3)
    same(prepare(model, x), model, x)


def test_an_exported_program_and_an_autocast_block_are_networks() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.conv(x).float().relu()

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    assert {n.target for n in prepare(Halved().eval(), x).graph.nodes} >= {"conv", "relu"}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    same(prepare(program, x), plain, x)


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (print, torch.randn(1, 3), "torch.nn.Module"),
        (nn.Linear(3, 3, device="meta"), torch.randn(1, 3), "weight: is on the device 'meta'"),
        (nn.Linear(3, 3), torch.full((1, 3), torch.nan), "NaN or infinity"),
        (nn.Linear(3, 3), torch.randn(0, 3), r"\(0, 3\)"),
    ],
)
def test_what_is_no_network_or_no_example_is_named(model: Any, example: Tensor, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        prepare(model, example)


def test_computed_weights_that_are_not_finite_are_named() -> None:
    class Computed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.log(), self.bias)

    with pytest.raises(WeightsError, match=r"^0\.weight: the network computes these weights .* hold NaN or infinity"):
        prepare(nn.Sequential(Computed(3, 3)), torch.randn(2, 3))


def test_a_layer_whose_weight_is_a_buffer_holds_nothing_else() -> None:
    class Blurred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.ones(3, 1, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1)).relu(), self.kernel, groups=3)

    model, x = nn.Sequential(Blurred(), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    network = prepare(model, x)
    same(network, model, x)
    called = {str(n.target) for n in network.graph.nodes if n.op == "call_module"}
    assert not any(a != b and a.startswith(f"{b}.") for a in called for b in called)


class EverySecond(nn.Module):
    """What stays of two columns is one, whose stride is 2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)[:, ::2]


def test_one_column_of_two_is_compared_like_any_other():
    model, x = EverySecond().eval(), torch.randn(3, 2)
    same(prepare(model, x), model, x)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_preparing_needs_no_more_memory_than_a_forward():
    script = Path(__file__).parents[1] / "benchmarks" / "preparation.py"
    lines = subprocess.run(
        [sys.executable, script, "--layers", "6", "--size", "320"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert found["prepare"] <= found["forward"] + 2 * found["weights"] + 8  # what Python holds itself


@pytest.mark.parametrize("value", [float("-inf"), -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("pads", [(0, 1, 0, 1), (1, 0), (0, 1, 1, 0)])
def test_padding_that_does_not_count_in_front_of_a_pool_is_the_pools(pads: tuple[int, ...], value: float) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(2, 4, 3), nn.MaxPool2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pool(nn.functional.pad(self.conv(x), pads, value=value))

    network, x = Padded().eval(), torch.randn(2, 2, 9, 9)
    prepared = prepare(network, x)
    with torch.no_grad():
        assert torch.equal(prepared(x), network(x))
    assert [type(module) for module in prepared.children()] == [nn.Conv2d, m.PaddedMaxPool]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_padding_that_counts_in_front_of_a_pool_stays(value: float) -> None:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.max_pool2d(nn.functional.pad(x, (0, 1), value=value), 2)

    kinds = [type(module) for module in prepare(Padded(), torch.randn(2, 2, 8, 8)).children()]
    assert m.PaddedMaxPool not in kinds
    assert len(kinds) == 2


def test_a_window_in_the_padding_alone_keeps_the_padding() -> None:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.max_pool1d(nn.functional.pad(x, (1, 1), value=-1e4), 2, 1, dilation=2)

    x = torch.randn(2, 3, 1)
    with torch.no_grad():
        assert torch.equal(prepare(Padded(), x)(x), Padded()(x))
