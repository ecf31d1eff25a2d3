"""Mixed precision: the integer program against brute force, costs by hand, a Hessian that is known, the command."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pow2quant import config as configuration
from pow2quant import models, prepare, simulate
from pow2quant.cli import main
from pow2quant.config import QuantPlan, RunConfig
from pow2quant.errors import ConfigError
from pow2quant.study import costs, latency, limits
from pow2quant.study.candidates import configured, groups_of, uniform
from pow2quant.study.front import Point, front, table
from pow2quant.study.program import Problem, Quantity
from pow2quant.study.sensitivity import Measurement, kl_divergence, only, traces
from tests.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def weights() -> Path:
    return models.DIGITS_WEIGHTS


def short(weights: Path, output: Path) -> list[str]:
    return [
        *("--weights", str(weights), "--output", str(output), "--max-calibration-batches", "4", "--quiet"),
        *("--max-eval-batches", "2", "--max-sensitivity-batches", "1", "--points", "2"),
    ]


# The integer program


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to four groups with up to three candidates; a quantity with parts of single groups, one with pairs as well."""
    candidates = {f"g{i}": tuple("abc"[: draw(st.integers(1, 3))]) for i in range(draw(st.integers(1, 4)))}
    value = st.integers(0, 20)

    def values(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(value, min_size=size, max_size=size)), float).reshape(shape)

    singles = [{g: values(len(names)) for g, names in candidates.items()} for _ in range(2)]
    pairs = {
        (a, b): values(len(candidates[a]), len(candidates[b]))
        for a, b in itertools.pairwise(candidates)
        if draw(st.booleans())
    }
    return Problem(candidates, {"loss": Quantity(singles[0], {}), "cost": Quantity(singles[1], pairs)})


@settings(max_examples=60)
@given(problems(), st.integers(0, 80), st.sampled_from([("loss", "cost"), ("cost", "loss")]))
def test_the_program_finds_what_brute_force_finds(problem: Problem, limit: int, names: tuple[str, str]) -> None:
    minimized, limited = names
    plans = [dict(zip(problem.candidates, p, strict=True)) for p in itertools.product(*problem.candidates.values())]
    within = [problem.value(minimized, p) for p in plans if problem.value(limited, p) <= limit]
    found = problem.least(minimized, {limited: limit})
    if not within:
        assert found is None
    else:
        assert found is not None
        assert problem.meets(found, {limited: limit})
        assert problem.value(minimized, found) == pytest.approx(min(within), abs=1e-6)


def test_raising_takes_the_most_gain_for_its_cost_and_stays_within_limits() -> None:
    candidates = {"a": ("2", "4"), "b": ("2", "4"), "c": ("2", "4")}
    loss = {"a": np.array([10.0, 0]), "b": np.array([6.0, 0]), "c": np.array([1.0, 0])}
    cost = {"a": np.array([0.0, 5]), "b": np.array([0.0, 2]), "c": np.array([0.0, 50])}
    problem = Problem(candidates, {"loss": Quantity(loss, {}), "cost": Quantity(cost, {})})
    start = dict.fromkeys(candidates, "2")
    raised = ["".join(p.values()) for p in problem.raised(start, "loss", "cost", {"cost": 20})]
    assert raised == ["242", "442"]  # b: 6 for 2, a: 10 for 5; c would cost 50


# Costs


class Small(nn.Module):
    """(1, 6, 6) -> convolution (2, 6, 6) -> depthwise, stride 2 (2, 3, 3) -> 18 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(2, 2, 3, stride=2, padding=1, groups=2, bias=False)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(18, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.flat(self.depthwise(self.relu(self.conv(x)))))


def described(plan: QuantPlan, weights: tuple[str, ...], outputs: tuple[str, ...] = ()) -> tuple:
    torch.manual_seed(0)
    example = torch.rand(1, 1, 6, 6)
    network = prepare(Small().eval(), example)
    placement = simulate(network, example, plan).placement
    groups = groups_of(network, placement, plan, weights, outputs)
    return groups, costs.layers_of(network, placement, groups)


def test_costs_are_those_of_a_calculation_by_hand() -> None:
    groups, layers = described(QuantPlan.default(activation_bits=6), ("2", "4", "float32"))
    assert [(y.name, y.weights, y.biases, y.scales, y.macs, y.source_bits) for y in layers] == [
        ("conv", 18, 2, 2, 2 * 36 * 9, 8),
        ("depthwise", 18, 0, 2, 2 * 9 * 9, 6),
        ("fc", 72, 4, 4, 4 * 18, 6),
    ]
    names = {g.name: g.candidates for g in groups}
    problem = Problem(names, costs.quantities(layers, groups))
    plan = uniform(groups, "weight", "4") | {"conv.weight": "2", "fc.weight": "float32"}
    # ceil(18 * 2 / 8) + 18 * 4 / 8 + 72 * 4 bytes; 6 biases of 4 bytes; 8 exponents
    assert problem.value("size", plan) == 5 + 9 + 288 + 24 + 8
    assert problem.value("average_bits", plan) == pytest.approx((18 * 2 + 18 * 4 + 72 * 32) / 108)
    assert problem.value("bops", plan) == 648 * 2 * 8 + 162 * 4 * 6 + 72 * 32 * 6


def test_bit_operations_multiply_what_is_chosen_for_weight_and_input() -> None:
    groups, layers = described(QuantPlan.default(), ("2", "8"), ("4", "8"))
    problem = Problem({g.name: g.candidates for g in groups}, costs.quantities(layers, groups))
    plan = uniform(groups, "", None) | {"relu.output": "4", "depthwise.weight": "2", "depthwise.output": "4"}
    assert problem.value("bops", plan) == 648 * 8 * 8 + 162 * 2 * 4 + 72 * 8 * 4


def test_transposed_convolutions_are_counted_from_their_inputs() -> None:
    example = torch.rand(1, 3, 5, 5)
    network = prepare(nn.Sequential(nn.ConvTranspose2d(3, 2, 2, stride=2)).eval(), example)
    (node,) = [n for n in network.graph.nodes if n.op == "call_module"]
    assert costs.macs(network.get_submodule(node.target), node) == 3 * 25 * 2 * 4


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.fc(self.conv(x).permute(0, 2, 3, 1).flatten(1, 2))  # (N, 64, 16) -> (N, 64, 64)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_linear_layer_on_tokens_counts_every_token_once(batch: int) -> None:
    example, plan = torch.rand(batch, 3, 32, 32), QuantPlan.default()
    network = prepare(Tokens().eval(), example)
    placement = simulate(network, example, plan).placement
    groups = groups_of(network, placement, plan, ("8",), ("8",))
    layers = costs.layers_of(network, placement, groups)
    counted = {layer.name: layer.macs for layer in layers}
    assert counted == {"conv": 16 * 64 * 48, "fc": 64 * 16 * 64, "head": 640}
    problem = Problem({g.name: g.candidates for g in groups}, costs.quantities(layers, groups))
    assert problem.value("bops", uniform(groups, "", None)) == 64 * sum(counted.values())


def test_what_overrides_decide_is_not_searched_and_plans_become_overrides() -> None:
    values = {"conv": {"weight": {"bitwidth": 7}}, "fc": {"weight": None}}
    config = configuration.with_values(RunConfig(), {"quantization.overrides": values})
    plan = configuration.plan_of(config)
    groups, _ = described(plan, ("2", "4"), ("4", "8"))
    assert {g.name: g.candidates for g in groups} == {
        "conv.weight": ("7",),
        "relu.output": ("4", "8"),
        "depthwise.weight": ("2", "4"),
        "depthwise.output": ("4", "8"),
        "fc.weight": ("float32",),
        "fc.output": ("4", "8"),
    }
    written = configured(config, groups, uniform(groups, "weight", "2")).quantization.overrides
    assert written["conv"] == {"weight": {"bitwidth": 7}}
    assert written["depthwise"] == {"weight": {"bitwidth": 2}, "output": {"bitwidth": 8}}
    assert written["fc"] == {"weight": None, "output": {"bitwidth": 8}}


def test_inputs_of_a_concatenation_are_chosen_together() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    example = torch.rand(1, 1, 4, 4)
    network = prepare(Branches().eval(), example)
    plan = QuantPlan.default()
    groups = groups_of(network, simulate(network, example, plan).placement, plan, ("4",), ("4", "8"))
    assert [g.sites for g in groups if g.role == "output"] == [("concat.output", "a.output", "b.output")]


CHIP = """
macs_per_us: {4x8: 100, 8x8: 50}
weight_bytes_per_us: 10
layer_us: 1.5
layers: {conv: {4x8: 3.25}}
"""


def test_a_chips_table_says_how_long_a_layer_takes(tmp_path: Path) -> None:
    path = tmp_path / "chip.yaml"
    path.write_text(CHIP)
    chip = costs.load_chip(path)
    _, layers = described(QuantPlan.default(), ("4",))
    conv, depthwise, fc = layers
    assert chip.microseconds(conv, "2", "8") == 3.25  # the next wider pair that is listed
    assert chip.microseconds(depthwise, "4", "8") == 162 / 100 + 1.5
    assert chip.microseconds(depthwise, "5", "6") == 162 / 50 + 1.5
    assert chip.microseconds(fc, "8", "8") == 72 / 10 + 1.5  # reading 72 bytes takes longer than 72 products
    with pytest.raises(ConfigError, match=r"macs_per_us\.9x8: missing"):
        chip.microseconds(fc, "9", "8")
    with pytest.raises(ConfigError, match=r"layers\.conv\.float32x8: missing"):
        chip.microseconds(conv, "float32", "8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("macs_per_us: {4y8: 1}", "macs_per_us.4y8: unknown key"),
        ("macs_per_us: {4x8: fast}", "macs_per_us.4x8: 'fast' is not legal; legal: a number above 0"),
        ("macs_per_us: {4x8: -1}", "macs_per_us.4x8: -1 is not legal"),
        ("layers: {conv: 3}", "layers.conv: 3 is not legal"),
        ("layers: {conv: {1x8: 3}}", "layers.conv.1x8: unknown key"),
        ("mac_per_us: {4x8: 1}", "mac_per_us: unknown key, did you mean macs_per_us?"),
        ("layer_us: -1", "layer_us: -1 is not legal"),
        ("name: idle", "the table says nothing"),
        ("[1, 2]", "a mapping with keys of name"),
        ("layers: {", "not YAML"),
    ],
)
def test_a_bad_table_is_named_by_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "chip.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        costs.load_chip(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert words in str(raised.value)


def test_layers_are_timed_from_integers_to_integers() -> None:
    torch.manual_seed(0)
    example = torch.rand(1, 1, 6, 6)
    sim = simulate(prepare(Small().eval(), example), example)
    sim.calibrate([example])
    parts = dict(latency.parts(sim.export(example), ["conv", "depthwise", "fc"]))
    assert [n.op_type for n in parts["conv"].graph.node].count("QuantizeLinear") == 1
    ends = [v for m in parts.values() for v in (*m.graph.input, *m.graph.output)]
    assert {v.type.tensor_type.elem_type for v in ends} == {onnx.TensorProto.UINT8}
    groups, layers = described(QuantPlan.default(), ("8",))
    chip = latency.measured([(uniform(groups, ""), sim.export(example))], layers, "here")
    assert {name: list(times) for name, times in chip.layers.items()} == {y.name: ["8x8"] for y in layers}
    assert all(chip.microseconds(y, "8", "8") > 0 for y in layers)


# Sensitivity


def test_the_trace_of_a_quadratics_hessian_is_known() -> None:
    torch.manual_seed(0)
    a = torch.randn(5, 5)
    a = a + a.T
    x = torch.zeros(5, requires_grad=True)
    y = torch.ones(3, requires_grad=True)
    loss = 0.5 * x @ a @ x + (torch.tensor([1.0, 2.0, 3.0]) * y**2).sum() + x[:3] @ y
    every = [[torch.tensor(z) * 2.0 - 1 for z in itertools.product((0.0, 1.0), repeat=n)] for n in (5, 3)]
    assert traces(loss, [x, y], every) == pytest.approx([a.trace().item(), 12.0], abs=1e-4)  # the whole expectation


def test_the_divergence_of_two_distributions_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert float(kl_divergence(q.log(), p.log())) == pytest.approx(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sensitivities_grow_as_widths_shrink_and_are_zero_for_floats(backend: str) -> None:
    torch.manual_seed(0)
    x, labels = torch.rand(16, 1, 6, 6), torch.arange(16) % 4
    network = prepare(Small().eval(), x)
    groups = groups_of(
        network,
        simulate(network, x, QuantPlan.default()).placement,
        QuantPlan.default(),
        ("2", "8", "float32"),
        ("3", "8"),
    )
    simulations = {}
    for role, name in (("weight", "2"), ("weight", "8"), ("output", "3"), ("output", "8")):
        plan = QuantPlan.default(*((int(name), 8) if role == "weight" else (8, int(name))))
        simulations[role, name] = sim = simulate(network, x, plan, backend)
        sim.calibrate([x])
        sim.parameter("conv.bias").data.add_(1)  # as a method might; the float network elsewhere must not notice
        sim.calibrate((), roles={"bias"})
    measurement = Measurement(groups, simulations, [((x,), labels)], nn.CrossEntropyLoss(), 0)
    for metric in configuration.SENSITIVITIES:
        table = measurement.table(metric)
        assert set(table) == {g.name for g in groups}
        assert all(row.get("float32", 0.0) == 0.0 for row in table.values())
        if metric in ("kl", "sqnr"):
            for name, row in table.items():
                narrow, wide = (row["2"], row["8"]) if name.endswith("weight") else (row["3"], row["8"])
                assert narrow > wide > 0, (metric, name)
    with simulations["weight", "2"].intercept(only((), simulations["weight", "2"])), torch.no_grad():
        assert torch.equal(simulations["weight", "2"].model(x.clone()), network(x))


# Constraints and points


@pytest.mark.parametrize(
    ("text", "quantity", "value"),
    [
        ("accuracy=0.88", "accuracy", 88),
        ("accuracy=88%", "accuracy", 88),
        ("accuracy-drop=0.5%", "accuracy_drop", 0.5),
        ("size=0.5MB", "size", 5e5),
        ("size=2KiB", "size", 2048),
        ("average_bits=5.2", "average_bits", 5.2),
        ("bops=1.2G", "bops", 1.2e9),
        ("latency=1.5ms", "latency", 1500),
        ("latency=80us", "latency", 80),
    ],
)
def test_constraints_are_read_with_their_units(text: str, quantity: str, value: float) -> None:
    constraint = limits.parse(text)
    assert (constraint.quantity, constraint.value) == (quantity, pytest.approx(value))


@pytest.mark.parametrize("text", ["size", "weight=3", "size=3", "size=-1MB", "latency=3h", "accuracy=88", "bops=many"])
def test_constraints_that_cannot_be_read_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"constraint: .*="):
        limits.parse(text)


def test_the_front_holds_what_nothing_beats() -> None:
    def point(size: float, accuracy: float) -> Point:
        return Point("found", {}, accuracy, 0.0, {"size": size})

    points = [point(3, 90), point(1, 80), point(2, 79), point(2, 85), point(4, 90)]
    assert [(p.costs["size"], p.accuracy) for p in front(points, "size")] == [(1, 80), (2, 85), (3, 90)]
    rows = list(csv.DictReader(table(points, "size", points[0]).splitlines()))
    assert [r["on_front"] for r in rows] == ["True", "False", "True", "True", "False"]


# The command


@pytest.mark.parametrize("backend", BACKENDS)
def test_search_writes_a_plan_that_ptq_repeats_to_the_bit(
    weights: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    arguments = ["--objective", "size", "--constraint", "accuracy_drop=3%", "--candidates", "2,4", "--backend", backend]
    assert main(["search", *arguments, *short(weights, run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = document["search"]
    assert document["final_accuracy"] == found["chosen"]["accuracy"]
    assert document["final_accuracy"] >= found["accuracy_floor"]
    assert {p["kind"] for p in found["points"]} >= {"uniform 2", "uniform 4"}
    assert (run / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert len((run / "sensitivity.csv").read_text().splitlines()) == 1 + 2 * 5
    assert json.loads((run / "search.json").read_text()) == found
    assert "Mixed precision" in (run / "report.html").read_text()
    assert all(p["change_interval"][0] <= p["change"] <= p["change_interval"][1] for p in found["points"])
    chosen = next(p for p in found["points"] if p["chosen"])
    evaluation = json.loads((run / "report.json").read_text())["evaluation"]
    assert chosen["change_interval"] == pytest.approx(evaluation["interval"])
    assert f"{chosen['change']:+.2f} (" in (run / "search.html").read_text()
    if backend == "custom":
        assert main(["ptq", "--config", str(run / "plan.yaml"), "--output", str(again), "--quiet"]) == 0
        assert (again / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()


def test_activations_are_chosen_too_and_bit_operations_stay_within_their_limit(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--objective", "accuracy", "--constraint", "bops=4.5M", "--candidates", "3,4", "--method", "none"]
    more = ["--activation-candidates", "5,8", "--sensitivity", "hessian"]
    assert main(["search", *arguments, *more, *short(weights, tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert found["chosen"]["bops"] <= 4.5e6
    written = yaml.safe_load((tmp_path / "run" / "plan.yaml").read_text())["quantization"]["overrides"]
    assert {o["output"]["bitwidth"] for o in written.values() if "output" in o} == {5, 8}


def test_another_chip_gives_another_plan_and_both_are_in_time(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_at_4 = tmp_path / "slow.yaml"
    slow_at_4.write_text("macs_per_us: {4x8: 1000, 8x8: 4000}\nlayer_us: 1")
    plans = []
    for chip, limit in ((ROOT / "configs/chips/example.yaml", "0.0285ms"), (slow_at_4, "0.09ms")):
        run = tmp_path / chip.stem
        arguments = ["--objective", "accuracy", "--constraint", f"latency={limit}", "--latency-table", str(chip)]
        assert main(["search", *arguments, "--candidates", "4,8", *short(weights, run), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["search"]
        assert found["chosen"]["latency"] <= float(limit.removesuffix("ms")) * 1e3
        plans.append(found["plan"])
        assert costs.load_chip(run / "latency.yaml").name
    assert plans[0] != plans[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "speed"], ["search.objective", "latency"]),
        (["--objective", "size"], ["needs a constraint on the accuracy"]),
        (["--objective", "accuracy", "--constraint", "accuracy=0.9"], ["needs a constraint on a cost"]),
        (["--constraint", "accuracy=0.9", "--candidates", "2,bf16"], ["bf16", "float32"]),
        (["--constraint", "accuracy=0.9", "--activation-candidates", "float16"], ["float16", "2 to 16"]),
        (["--constraint", "accuracy=0.9", "--candidates", "float32"], ["floats alone", "2 to 16"]),
        (["--constraint", "accuracy=0.9", "--constraint", "size=100B"], ["size=100B cannot be met", "size=3.614kB"]),
        (
            ["--objective", "accuracy", "--constraint", "size=6kB", "--constraint", "bops=3.69M"],
            ["bops=3.69M cannot be met", "with size=6kB"],
        ),
        (["--constraint", "accuracy=0.9", "--sensitivity", "guess"], ["sensitivity", "hessian"]),
        (["--constraint", "accuracy=1.0", "--candidates", "2"], ["nothing is left to choose"]),
    ],
)
def test_what_cannot_be_searched_is_said_in_one_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(["search", *arguments, *short(weights, tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()


def test_a_measured_latency_knows_every_pair_of_widths(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--objective",
        "latency",
        "--constraint",
        "accuracy_drop=50%",
        "--candidates",
        "4,8",
        "--method",
        "none",
    ]
    run = tmp_path / "run"
    more = ["--activation-candidates", "5,6", "--json"]
    assert main(["search", *arguments, *more, *short(weights, run)]) == 0
    assert json.loads(capsys.readouterr().out)["search"]["chosen"]["latency"] > 0
    times = costs.load_chip(run / "latency.yaml").layers
    assert set(times["conv1"]) == {"4x8", "8x8"}  # the input keeps its width
    assert set(times["fc"]) == {"4x5", "8x5", "4x6", "8x6"}


def test_an_interrupted_search_leaves_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pow2quant.study.sensitivity.kl_divergence", interrupted)
    monkeypatch.setattr("pow2quant.runs.unfinished.PAUSE", 3600)  # where more time is lost, what was done is kept
    arguments = ["--constraint", "accuracy=0.9", "--candidates", "4,8"]
    assert main(["search", *arguments, *short(weights, tmp_path / "run")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_accuracy_out_of_reach_is_told_with_the_best_that_is_not(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--constraint", "accuracy=1.0", "--candidates", "2,3", "--activation-bits", "2", "--method", "none"]
    assert main(["search", *arguments, *short(weights, tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "accuracy=1.0 cannot be met: asked for 100.00 %, the best reachable is" in error
    assert list(tmp_path.iterdir()) == []
