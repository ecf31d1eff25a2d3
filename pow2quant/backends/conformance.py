"""What every backend must do: `CHECKS`, each a function of a backend that raises AssertionError where it does not.

For a backend of your own, in a test file:

    import pytest
    from pow2quant.backends.conformance import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conforms(check):
        check(MyBackend)

There is no tolerance anywhere: what is compared is equal to the last bit.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import Backend, Simulation, Tap
from pow2quant.backends.custom import CustomSimulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.backends.placement import place
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import DataError, EncodingError, Pow2QuantError
from pow2quant.frontends.prepare import prepare
from pow2quant.pow2_constraints import Encoding, IntGrid, power_of_two

PLAN = QuantPlan(
    weight=TensorSpec(8, symmetric=True, per_channel=True),
    input=TensorSpec(8, symmetric=False),
    output=TensorSpec(8, symmetric=False),
    bias=TensorSpec(32, symmetric=True),
)
LOW_BITS = replace(PLAN, weight=TensorSpec(3, symmetric=True, per_channel=True), output=TensorSpec(4, symmetric=False))
PER_TENSOR = replace(PLAN, weight=TensorSpec(8, symmetric=True), output=TensorSpec(8, symmetric=True))
WIDE = replace(PLAN, weight=TensorSpec(16, symmetric=True, per_channel=True), output=TensorSpec(16, symmetric=False))
FREE = QuantPlan(
    weight=TensorSpec(8, symmetric=True, per_channel=True, power_of_2=False),
    input=TensorSpec(8, symmetric=False, power_of_2=False),
    output=TensorSpec(8, symmetric=False, power_of_2=False),
    bias=TensorSpec(32, symmetric=True, power_of_2=False),
)


class Network(nn.Module):
    """(N, 3, 8, 8) -> logits (N, 5) and (N, 8): every way in which placement treats a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.side = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shared = nn.Conv2d(8, 8, 1)
        self.tied = nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 16, 1)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input is read twice, a module is called twice, a concatenation ties the one input that it alone reads."""
        a = self.stem(x) + F.relu6(self.side(x))
        b = F.hardswish(self.depthwise(F.max_pool2d(a, 2)))
        b = self.shared(F.relu(self.shared(b)))
        c = torch.cat([F.max_pool2d(self.tied(a), 2), b], 1)
        c = c * torch.sigmoid(self.gate(F.silu(b).mean((2, 3), keepdim=True)))
        logits: Tensor = self.fc(self.up(c).mean((2, 3)))
        return logits, b.mean((2, 3))


@cache
def _prepared() -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean, module.running_var = torch.randn(8) / 4, torch.rand(8) + 0.5
        return fold_batch_norm(prepare(model, _batch()))


def _batch(n: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _simulation(backend: Backend, plan: QuantPlan = PLAN, calibrated: bool = True) -> Simulation:
    sim = backend(_prepared(), _batch(), plan)
    if calibrated:
        sim.calibrate([_batch(), _batch(4, 2)])
    return sim


def _run(model: nn.Module, x: Tensor | None = None) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = model(_batch() if x is None else x)
    return tuple(y.clone() for y in result)


def _same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _assert_tables(got: Table, expected: Table) -> None:
    assert set(got) == set(expected), f"sites {sorted(set(got) ^ set(expected))} are in one table only"
    wrong = [name for name in expected if got[name] != expected[name]]
    assert not wrong, f"{wrong[0]}: {got[wrong[0]]} instead of {expected[wrong[0]]} ({len(wrong)} sites differ)"


@contextmanager
def _raises(error: type[Pow2QuantError], *words: str) -> Iterator[None]:
    message = None
    try:
        yield
    except error as raised:
        message = str(raised)
    assert message is not None, f"{error.__name__} was not raised"
    missing = [word for word in words if word not in message]
    assert not missing, f"the message {message!r} does not name {missing}"


def _float(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
    return x


def _roles(sim: Simulation, *roles: str) -> set[str]:
    return {s.name for s in sim.sites if s.role in roles}


def _some_table(sim: Simulation, plan: QuantPlan, seed: int = 0) -> Table:
    """An encoding for every site: other exponents than calibration's, odd zero points, a narrow grid."""
    rng = np.random.default_rng(seed)
    table = _simulation(CustomSimulation, plan).encodings()
    for site in sim.sites:
        old = table[site.name]
        if site.role == "bias":
            continue
        scale = old.scale * power_of_two(rng.integers(-2, 3, old.scale.shape))
        zero_point = old.zero_point if old.grid.signed else np.array(rng.integers(int(old.grid.qmax) + 1))
        narrow = old.grid.signed and bool(rng.integers(2))
        table[site.name] = Encoding(scale, zero_point, replace(old.grid, narrow=narrow), old.axis)
    return table


# -- placement and names -----------------------------------------------------------------------------------------------


def sites_are_those_of_the_placement(backend: Backend) -> None:
    """One site per quantized tensor, in order of computation, for several plans."""
    no_stem = replace(PLAN, overrides=(("stem.0", None), ("shared*", {"weight": None})))
    for plan in (PLAN, replace(PLAN, output=None), replace(PLAN, weight=None, input=None), no_stem):
        sim = _simulation(backend, plan)
        assert tuple(sim.sites) == place(_prepared(), plan).sites
        assert set(sim.encodings()) == {s.name for s in sim.sites}
        assert _same(_run(sim.model), _run(_simulation(CustomSimulation, plan).model))


def submodules_keep_their_names_and_float_parameters(backend: Backend) -> None:
    """`model` has the network's submodules; `.weight` and `.bias` are its floats, trainable, and copies."""
    network, model = _prepared(), _simulation(backend).model
    missing = {name for name, _ in network.named_modules()} - {name for name, _ in model.named_modules()}
    assert not missing, f"the model has no {sorted(missing)[0]}"
    for name, parameter in network.named_parameters(remove_duplicate=False):
        own = model.get_parameter(name)
        assert (own.dtype, own.requires_grad, own.is_leaf) == (torch.float32, True, True), name
        assert torch.equal(own, parameter), name
        assert own.data_ptr() != parameter.data_ptr(), f"{name} is the network's own"
    assert model.get_parameter("shared.weight") is model.get_parameter("shared_1.weight"), "a shared weight was copied"


def the_network_is_left_as_it_is(backend: Backend) -> None:
    """Neither a simulation nor its training changes what it was made of."""
    network = copy.deepcopy(_prepared())
    state, code = copy.deepcopy(network.state_dict()), network.code
    sim = backend(network, _batch(), PLAN)
    sim.calibrate([_batch()])
    with torch.no_grad():
        sim.model.get_parameter("fc.weight").add_(1)
    assert network.code == code
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def methods_find_what_they_look_for(backend: Backend) -> None:
    """The float network, the placement, and the parameters by name, shared ones too."""
    network = _prepared()
    sim = backend(network, _batch(), LOW_BITS)
    assert sim.network is network
    assert sim.placement == place(network, LOW_BITS)
    for name, _ in network.named_parameters(remove_duplicate=False):
        assert sim.parameter(name) is sim.model.get_parameter(name), name


def onnx_names_are_the_users(backend: Backend) -> None:
    """Nodes are called as modules, initializers as parameters; parameters lie on their grids; no site gets lost."""
    sim = _simulation(backend)
    artifact, table = sim.export(_batch()), sim.encodings()
    modules = {name for name, m in _prepared().named_modules() if not list(m.children()) and name}
    assert modules <= {n.name for n in artifact.model.graph.node}
    assert [i.name for i in artifact.model.graph.input] == ["x"]
    _assert_tables({name: artifact.encodings[name] for name in table}, table)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in artifact.model.graph.initializer}
    for name in _roles(sim, "weight", "bias"):
        expected = table[name].fake_quantize(sim.model.get_parameter(name).detach().numpy())
        assert np.array_equal(values[name], expected), name


# -- encodings ---------------------------------------------------------------------------------------------------------


def equal_data_give_equal_encodings(backend: Backend) -> None:
    """The tables and outputs are those of `custom`, for every kind of plan, and `calibrate` returns `encodings()`."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, WIDE, FREE):
        sim, reference = _simulation(backend, plan, calibrated=False), _simulation(CustomSimulation, plan)
        _assert_tables(sim.calibrate([_batch(), _batch(4, 2)]), reference.encodings())
        _assert_tables(sim.encodings(), reference.encodings())
        assert _same(_run(sim.model, _batch(3, 5)), _run(reference.model, _batch(3, 5)))


def scales_are_powers_of_two(backend: Backend) -> None:
    """Exactly, with even zero points; without the constraint they are not."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, WIDE):
        for name, encoding in _simulation(backend, plan).encodings().items():
            assert encoding.is_power_of_two, f"{name}: {encoding.scale}"
            assert not (encoding.zero_point % 2).any(), f"{name}: {encoding.zero_point}"
    free = _simulation(backend, FREE).encodings().values()
    assert sum(encoding.is_power_of_two for encoding in free) < len(free) / 2


def biases_lie_on_the_lattice(backend: Backend) -> None:
    """The scale of a bias is s_in * s_w, and the simulation computes with the quantized bias."""
    for plan in (PLAN, PER_TENSOR, FREE):
        sim = _simulation(backend, plan)
        table, seen = sim.encodings(), _tapped(sim)
        for layer in place(_prepared(), plan).layers:
            assert layer.bias is not None
            assert layer.weight is not None
            assert layer.input is not None
            scale = table[layer.input.name].scale * table[layer.weight.name].scale
            assert (table[layer.bias.name].scale == scale).all(), layer.bias.name
            _, quantized = seen[layer.bias.name]
            assert np.array_equal(quantized.numpy(), table[layer.bias.name].fake_quantize(quantized.numpy()))
    tap: Tap = lambda s, x, xq: xq + (s.name == "shared.bias")  # noqa: E731
    before = _run(sim.model)
    with sim.intercept(tap):
        assert not _same(_run(sim.model), before), "the bias that the tap returned is not used"


def ties_share_an_encoding(backend: Backend) -> None:
    """What a concatenation alone reads has the concatenation's encoding."""
    leaders = place(_prepared(), PLAN).leaders
    assert leaders == {"tied.output": "concat.output"}
    table = _simulation(backend).encodings()
    assert all(table[follower] == table[leader] for follower, leader in leaders.items())


def a_table_survives_loading(backend: Backend) -> None:
    """`encodings() == table` after `load`, bit for bit, in another simulation too; and again."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, WIDE, FREE):
        sim = _simulation(backend, plan, calibrated=False)
        assert sim.encodings() == {}
        for seed in (0, 1):
            table = _some_table(sim, plan, seed)
            sim.load(table)
            _assert_tables(sim.encodings(), table)
        reference = CustomSimulation(_prepared(), _batch(), plan)
        reference.load(table)
        assert _same(_run(sim.model), _run(reference.model))


def a_part_of_a_table_can_be_loaded(backend: Backend) -> None:
    """The sites that it leaves out have no encoding afterwards and pass their values; an empty one: all of them."""
    sim = _simulation(backend)
    table = {name: e for name, e in sim.encodings().items() if name in _roles(sim, "weight")}
    sim.load(table)
    _assert_tables(sim.encodings(), table)
    seen = _tapped(sim)
    assert all(torch.equal(*seen[name]) for name in _roles(sim, "input", "output", "bias"))
    assert not any(torch.equal(*seen[name]) for name in table)
    sim.load({})
    assert sim.encodings() == {}
    assert _same(_run(sim.model), _run(_prepared()))
    _assert_tables(sim.encodings(), {})


def unknown_sites_are_refused(backend: Backend) -> None:
    """With an error that names one; nothing is loaded then."""
    sim = _simulation(backend)
    before = sim.encodings()
    encoding = Encoding(np.array(1, np.float32), np.array(0), IntGrid(8, signed=False))
    with _raises(EncodingError, "no.such.output"):
        sim.load({"fc.output": encoding, "no.such.output": encoding})
    _assert_tables(sim.encodings(), before)


def roles_are_calibrated_on_their_own(backend: Backend) -> None:
    """The others stay as they are, to the last bit."""
    sim = _simulation(backend)
    for roles in ({"weight"}, {"input", "output"}, {"output"}, {"bias"}, {"weight", "bias"}):
        table = _some_table(sim, PLAN, len(roles))
        sim.load(table)
        sim.calibrate([_batch(8, 3) * 3], roles)
        kept = {s.name for s in sim.sites} - _roles(sim, *roles)
        after = sim.encodings()
        _assert_tables({name: after[name] for name in kept}, {name: table[name] for name in kept})
        assert any(after[name] != table[name] for name in _roles(sim, *roles))


def calibration_is_deterministic(backend: Backend) -> None:
    """Two simulations of one network agree; a second calibration with the same data changes nothing."""
    first, second = _simulation(backend), _simulation(backend)
    _assert_tables(second.encodings(), first.encodings())
    assert _same(_run(first.model), _run(second.model))
    assert _same(_run(first.model), _run(first.model))
    _assert_tables(second.calibrate([_batch(), _batch(4, 2)]), first.encodings())


def bad_calibration_data_are_refused(backend: Backend) -> None:
    """No data, and data that are not finite, with the tensor's name."""
    sim = _simulation(backend, calibrated=False)
    with _raises(DataError, "empty"):
        sim.calibrate([])
    poisoned = _batch()
    poisoned[0, 0, 0, 0] = torch.nan
    with _raises(DataError, "x", "batch 1"):
        sim.calibrate([_batch(), poisoned])


def export_needs_every_encoding(backend: Backend) -> None:
    """A site without one is named."""
    sim = _simulation(backend, calibrated=False)
    with _raises(EncodingError, "x"):
        sim.export(_batch())
    sim.calibrate([_batch()])
    sim.load({name: e for name, e in sim.encodings().items() if name != "up.output"})
    with _raises(EncodingError, "up.output"):
        sim.export(_batch())


# -- arithmetic --------------------------------------------------------------------------------------------------------


def values_are_fake_quantized(backend: Backend) -> None:
    """At every site as `Encoding.fake_quantize` does it, with and without gradients: ties, saturation, signs."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, FREE):
        sim = _simulation(backend, plan)
        table = _some_table(sim, plan)
        sim.load(table)
        spread = torch.linspace(-300, 300, 1201).repeat(2)  # whole and half codes, far beyond both ends
        huge = torch.tensor([0.0, -0.0, 1e-30, 1e9, -1e9, 3e19, -3e19, 1e30, -1e30])
        values = torch.cat([huge, spread])
        with torch.no_grad():
            for name in _roles(sim, "weight", "bias"):
                parameter = sim.model.get_parameter(name)
                unit = torch.from_numpy(table[name].along(table[name].scale, parameter.ndim).copy())
                parameter.copy_(values[torch.arange(parameter.numel()) * 7 % len(values)].view_as(parameter) * unit)
        x = values[torch.arange(8 * 192) % len(values)].view(8, 3, 8, 8) * float(table["x"].scale)
        for graded in (False, True):
            for name, (before, after) in _tapped(sim, x, graded, flow=_tame).items():
                expected = table[name].fake_quantize(before.numpy())
                wrong = int((after.numpy() != expected).sum())
                assert not wrong, f"{name}: {wrong} of {after.numel()} values differ ({plan})"


def _tame(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
    """Keeps what flows on finite, and halves of codes frequent."""
    return quantized.clamp(-1, 1) if site.role in ("weight", "bias") else quantized


def batches_have_any_size_and_stay_unharmed(backend: Backend) -> None:
    """The result of a sample does not depend on its batch, and inputs are not written."""
    sim = _simulation(backend)
    x = _batch(6)
    together = _run(sim.model, x)
    for i in (0, 5):
        assert _same(_run(sim.model, x[i : i + 1]), tuple(y[i : i + 1] for y in together))
    assert torch.equal(x, _batch(6)), "the simulation wrote over its input"


def results_stay_on_the_device(backend: Backend) -> None:
    """Of the network; also on a GPU, where there is one."""
    sim = _simulation(backend)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        sim.model.to(device)
        table = sim.encodings()
        assert all(y.device.type == device for y in _run(sim.model, _batch().to(device)))
        sim.calibrate([_batch(4, 9)])
        sim.load(table)
        assert all(p.device.type == device for p in sim.model.parameters())
        _assert_tables(sim.encodings(), table)


# -- taps --------------------------------------------------------------------------------------------------------------


def _tapped(
    sim: Simulation, x: Tensor | None = None, graded: bool = False, flow: Tap = lambda s, x, xq: xq
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every site's value before and behind quantization, in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def tap(site: Site, value: Tensor, quantized: Tensor) -> Tensor:
        assert site.name not in seen, f"{site.name} is tapped twice"
        seen[site.name] = value.detach().clone(), quantized.detach().clone()
        return flow(site, value, quantized)

    with sim.intercept(tap), torch.set_grad_enabled(graded):
        sim.model(_batch() if x is None else x)
    return seen


def a_float_tap_gives_the_float_network(backend: Backend) -> None:
    """`lambda site, x, xq: x` is the prepared network, bit for bit, before and after calibration."""
    for calibrated in (False, True):
        sim = _simulation(backend, calibrated=calibrated)
        with sim.intercept(_float):
            assert _same(_run(sim.model), _run(_prepared()))
            assert _same(_run(sim.model, _batch(3, 4)), _run(_prepared(), _batch(3, 4)))


def every_site_is_tapped_once(backend: Backend) -> None:
    """In the order of `sites`, with an encoding or without; parameters in their own shape, data with the batch."""
    for calibrated in (False, True):
        sim = _simulation(backend, calibrated=calibrated)
        seen = _tapped(sim, _batch(3))
        assert list(seen) == [s.name for s in sim.sites]
        for site in sim.sites:
            before, after = seen[site.name]
            assert before.shape == after.shape, site
            assert before.dtype == after.dtype == torch.float32, site
            if site.role in ("weight", "bias"):
                assert torch.equal(before, sim.model.get_parameter(site.name)), site
            else:
                assert len(before) == 3, site


def what_is_tapped_stays(backend: Backend) -> None:
    """Tensors that a tap kept are not written afterwards."""
    sim = _simulation(backend)
    kept: list[tuple[Tensor, Tensor]] = []

    def tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        kept.extend((t, t.clone()) for t in (x, quantized))
        return quantized

    with sim.intercept(tap):
        _run(sim.model)
    assert len(kept) == 2 * len(sim.sites)
    assert all(torch.equal(t, copied) for t, copied in kept)


def what_a_tap_returns_flows_on(backend: Backend) -> None:
    """At inputs, weights, biases and outputs."""
    sim = _simulation(backend)
    doubled = copy.deepcopy(_prepared())
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    with sim.intercept(lambda s, x, xq: x * 2 if s.role in ("weight", "bias") else x):
        assert _same(_run(sim.model), _run(doubled))
    with sim.intercept(lambda s, x, xq: _batch(8, 7) if s.role == "input" else x):
        assert _same(_run(sim.model), _run(_prepared(), _batch(8, 7)))
    with sim.intercept(lambda s, x, xq: torch.full_like(x, 7) if s.name == "fc.output" else xq):
        assert (_run(sim.model)[0] == 7).all()
    target = sim.sites[-1].name
    before = _run(sim.model)
    with sim.intercept(lambda s, x, xq: xq if s.name != target else xq + 1):
        assert not _same(_run(sim.model), before)


def taps_end_with_their_context(backend: Backend) -> None:
    """Also after an exception; an inner tap replaces the outer one until it ends."""
    sim = _simulation(backend)
    before = _run(sim.model)
    with sim.intercept(_float):
        with sim.intercept(lambda s, x, xq: xq):
            assert _same(_run(sim.model), before)
        assert _same(_run(sim.model), _run(_prepared()))
    try:
        with sim.intercept(_float):
            raise KeyError
    except KeyError:
        pass
    assert _same(_run(sim.model), before)


# -- training ----------------------------------------------------------------------------------------------------------


def _gradients(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    sum((y * y).sum() for y in model(_batch() if x is None else x)).backward()
    found = {name: model.get_parameter(name).grad for name, _ in _prepared().named_parameters()}
    assert all(g is not None and g.any() for g in found.values()), "a parameter gets no gradient"
    return {name: g.clone() for name, g in found.items() if g is not None}


def gradients_reach_the_parameters(backend: Backend) -> None:
    """In the float tap they are the float network's; quantizers let them through unchanged inside the grid."""
    sim = _simulation(backend)
    with sim.intercept(_float):
        floats, expected = _gradients(sim.model), _gradients(copy.deepcopy(_prepared()))
    assert all(torch.equal(floats[name], expected[name]) for name in expected)
    _gradients(sim.model)
    table = sim.encodings()

    def tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(quantized.sum(), x, retain_graph=True)
        codes = table[site.name].quantize(x.detach().numpy())
        inside = torch.from_numpy((codes > table[site.name].grid.qmin) & (codes < table[site.name].grid.qmax))
        assert inside.any(), site
        assert (gradient[inside] == 1).all(), f"{site.name}: the gradient of the quantizer is not 1"
        return quantized

    with sim.intercept(tap):
        sim.model(_batch().requires_grad_())


def gradients_reach_what_a_weight_tap_adds(backend: Backend) -> None:
    """As learned rounding needs it."""
    sim = _simulation(backend)
    names = _roles(sim, "weight")
    added = {name: torch.zeros_like(sim.model.get_parameter(name), requires_grad=True) for name in names}
    with sim.intercept(lambda s, x, xq: xq + added[s.name] if s.name in added else xq):
        _gradients(sim.model)
    assert all(v.grad is not None and v.grad.any() for v in added.values())


def training_keeps_powers_of_two(backend: Backend) -> None:
    """Whatever the model declares trainable; and the trained state computes what `custom` makes of it."""
    for make in (lambda p: torch.optim.SGD(p, 0.05), lambda p: torch.optim.Adam(p, 0.01)):
        sim = _simulation(backend)
        before = sim.model.get_parameter("fc.weight").detach().clone()
        optimizer = make(sim.model.parameters())
        for _ in range(10):
            _gradients(sim.model)
            optimizer.step()
        assert not torch.equal(sim.model.get_parameter("fc.weight"), before)
        assert all(encoding.is_power_of_two for encoding in sim.encodings().values())
        reference = CustomSimulation(_prepared(), _batch(), PLAN)
        _copy_parameters(sim, reference)
        reference.load(sim.encodings())
        assert _same(_run(sim.model), _run(reference.model)), "the scales in use are not those of encodings()"


def _copy_parameters(source: Simulation, target: Simulation) -> None:
    with torch.no_grad():
        for name, _ in _prepared().named_parameters():
            target.model.get_parameter(name).copy_(source.model.get_parameter(name))


def state_can_be_saved_and_restored(backend: Backend) -> None:
    """`state_dict()` and the table are all there is to save; files are read without running code."""
    sim = _simulation(backend, LOW_BITS)
    with torch.no_grad():
        for parameter in sim.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.1)
    table = _some_table(sim, LOW_BITS)
    sim.load(table)
    file = io.BytesIO()
    torch.save(sim.model.state_dict(), file)
    file.seek(0)
    restored = _simulation(backend, LOW_BITS, calibrated=False)
    restored.model.load_state_dict(torch.load(file, weights_only=True))
    restored.load(table)
    _assert_tables(restored.encodings(), table)
    assert _same(_run(restored.model), _run(sim.model))


def writing_a_weight_takes_effect(backend: Backend) -> None:
    """At the next call, after a call without gradients too; a frozen weight counts."""
    sim, reference = _simulation(backend), _simulation(CustomSimulation)
    sim.model.requires_grad_(False)
    for step in range(3):
        with torch.no_grad():
            sim.model.get_parameter("stem.0.weight").mul_(0.5)
        reference = CustomSimulation(_prepared(), _batch(), PLAN)
        _copy_parameters(sim, reference)
        reference.load(sim.encodings())
        assert _same(_run(sim.model), _run(reference.model)), f"write {step + 1} was not seen"


def copies_are_independent(backend: Backend) -> None:
    """`copy.deepcopy` of a simulation."""
    sim = _simulation(backend)
    table, before = sim.encodings(), _run(sim.model)
    twin = copy.deepcopy(sim)
    _assert_tables(twin.encodings(), table)
    assert _same(_run(twin.model), before)
    twin.load({})
    with torch.no_grad():
        twin.model.get_parameter("fc.weight").add_(1)
    _assert_tables(sim.encodings(), table)
    assert _same(_run(sim.model), before)


Check = Callable[[Backend], None]

CHECKS: tuple[Check, ...] = (
    sites_are_those_of_the_placement,
    submodules_keep_their_names_and_float_parameters,
    the_network_is_left_as_it_is,
    methods_find_what_they_look_for,
    onnx_names_are_the_users,
    equal_data_give_equal_encodings,
    scales_are_powers_of_two,
    biases_lie_on_the_lattice,
    ties_share_an_encoding,
    a_table_survives_loading,
    a_part_of_a_table_can_be_loaded,
    unknown_sites_are_refused,
    roles_are_calibrated_on_their_own,
    calibration_is_deterministic,
    bad_calibration_data_are_refused,
    export_needs_every_encoding,
    values_are_fake_quantized,
    batches_have_any_size_and_stay_unharmed,
    results_stay_on_the_device,
    a_float_tap_gives_the_float_network,
    every_site_is_tapped_once,
    what_is_tapped_stays,
    what_a_tap_returns_flows_on,
    taps_end_with_their_context,
    gradients_reach_the_parameters,
    gradients_reach_what_a_weight_tap_adds,
    training_keeps_powers_of_two,
    state_can_be_saved_and_restored,
    writing_a_weight_takes_effect,
    copies_are_independent,
)
"""What a backend is held to, one property each."""
