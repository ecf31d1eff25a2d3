"""Every method on every backend, free scales too; and the seam between methods, rewrites and runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import yaml
from torch import Tensor, fx

from pow2quant import config, datasets, models, plugins, quantize, runs
from pow2quant.backends import conformance
from pow2quant.backends.base import Progress, Simulation
from pow2quant.cli import main
from pow2quant.config import Choice, DataConfig, QuantPlan, RunConfig
from pow2quant.errors import ConfigError
from pow2quant.runs.chains import fixed, to_train, with_chain

PLANS = {
    "w4a8": conformance.PLAN,
    "w4a8_per_tensor": conformance.PER_TENSOR,
    "free": conformance.FREE,
}
METHODS = [name for name in plugins.TABLES["methods"] if hasattr(plugins.resolve("methods", name), "apply")]
QUICK: dict[str, dict[str, object]] = {
    "adaround": {"iterations": 100},
    "qdrop": {"iterations": 100},
}
"""Parameters with which a method is done in a second, for those that take longer."""


class Method(Protocol):
    def apply(self, sim: Simulation, batches: list[Tensor]) -> None: ...


def narrow(plan: QuantPlan, bits: int = 4) -> QuantPlan:
    assert plan.weight is not None
    return replace(plan, weight=replace(plan.weight, bits=bits))


def simulation(backend: str, plan: QuantPlan, bits: int) -> tuple[Simulation, list[Tensor]]:
    """The conformance suite's network: transposed, depthwise, shared and tied layers, two results."""
    if backend == "aimet":
        pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    batches = [conformance.batch(), conformance.batch(4, 2)]
    sim: Simulation = plugins.resolve("backends", backend)(conformance.prepared(), batches[0], narrow(plan, bits))
    sim.calibrate(batches)
    return sim, batches


def made(name: str) -> Method:
    torch.manual_seed(0)
    method: Method = config.parameters(plugins.resolve("methods", name), QUICK.get(name, {}), name)
    return method


def applied(name: str, backend: str, plan: QuantPlan) -> tuple[Simulation, list[Tensor]]:
    sim, batches = simulation(backend, plan, 2 if name == "ternary" else 4)
    made(name).apply(sim, batches)
    return sim, batches


@pytest.fixture(scope="module")
def weights() -> str:
    return str(models.DIGITS_WEIGHTS)


@pytest.fixture(scope="module")
def digits() -> list[Tensor]:
    """Eight batches of images."""
    return [x for x, _ in islice(datasets.load(DataConfig()).calibration, 8)]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(name, plan, id=f"{name}-{key}")
        for name in METHODS
        for key, plan in PLANS.items()
        if (name, key) != ("ternary", "free")  # an error, as tests/test_ternary.py shows
    ],
)
def test_a_method_leaves_a_complete_table_that_loads_and_exports(name: str, plan: QuantPlan) -> None:
    sim, batches = applied(name, "custom", plan)
    table = sim.encodings()
    assert set(table) == {s.name for s in sim.sites}
    if plan is not conformance.FREE:
        assert all(encoding.is_power_of_two for encoding in table.values())
    sim.load(table)
    assert sim.encodings() == table
    assert set(sim.export(batches[0]).encodings) >= {s.name for s in sim.sites if s.role in ("weight", "bias")}


@pytest.mark.parametrize("plan", [PLANS["w4a8"], PLANS["free"]], ids=["w4a8", "free"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "ternary"])  # which takes levels away
def test_a_method_brings_a_trained_network_nearer_to_float(
    name: str, plan: QuantPlan, weights: str, digits: list[Tensor]
) -> None:
    sim = runs.simulate(models.build("digits-cnn", weights=weights), digits[0], narrow(plan))
    sim.calibrate(digits[:4])
    errors = [float_error(sim, digits[4:])]
    made(name).apply(sim, digits[:4])
    errors.append(float_error(sim, digits[4:]))
    assert errors[1] < errors[0]


def float_error(sim: Simulation, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((sim.model(x) - sim.network(x)).square().sum()) for x in batches)


@pytest.mark.parametrize("name", METHODS)
def test_the_backends_give_equal_tables_and_parameters(name: str) -> None:
    ours, aimets = (applied(name, backend, conformance.PLAN)[0] for backend in ("custom", "aimet"))
    assert ours.encodings() == aimets.encodings()
    for layer in ours.placement.layers:
        for kind in ("weight", "bias"):
            assert torch.equal(ours.parameter(f"{layer.module}.{kind}"), aimets.parameter(f"{layer.module}.{kind}"))


# -- in a run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubling:
    """A rewrite: doubles the last layer.

    factor: by which it is multiplied.
    """

    factor: float = 2.0

    def rewrite(self, network: fx.GraphModule, batches: object) -> fx.GraphModule:
        with torch.no_grad():
            for parameter in network.get_submodule("fc").parameters():
                parameter *= self.factor
        return network


@dataclass(frozen=True)
class Counting:
    """A method that reads the data twice and speaks."""

    def apply(self, sim: Simulation, batches: object, progress: Progress) -> None:
        first, second = (sum(len(x) for x in batches) for _ in range(2))  # type: ignore[attr-defined]
        progress.note(f"{first} and {second} images")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Doubling, Counting):
        monkeypatch.setitem(plugins.TABLES["methods"], kind.__name__.lower(), f"{__name__}:{kind.__name__}")


def configured(weights: str, methods: object, bits: int = 4) -> RunConfig:
    values = {"ptq.calibration_batches": 4, "quantization.weight.bitwidth": bits, "ptq.methods": methods}
    return config.with_values(RunConfig(), {"model.weights": weights} | values)


def test_the_default_follows_the_width_of_the_weights(weights: str, tmp_path: Path) -> None:
    results = {
        label: runs.ptq(configured(weights, methods, bits), tmp_path / label)
        for label, methods, bits in (("default", None, 4), ("none", [], 4), ("eight", None, 8))
    }
    steps = {label: run.report["pipeline_steps"][:-1] for label, run in results.items()}
    expected = {
        "default": ["align", "calibrate", "gptq", "bias_correction"],
        "none": ["calibrate"],
        "eight": ["calibrate", "bias_correction"],
    }
    assert steps == expected
    assert results["default"].report["final_sqnr_db"] > results["none"].report["final_sqnr_db"] + 3
    assert all(run.agrees for run in results.values())
    names = [m.name for m in config.load(tmp_path / "default" / "config.yaml").ptq.methods or ()]
    assert names == ["align", "gptq", "bias_correction"], "the run can be repeated from its configuration"


@pytest.mark.parametrize(
    ("bits", "per_channel", "names"),
    [
        (4, True, ["align", "gptq", "bias_correction"]),
        (4, False, ["align", "output_mse"]),
        (8, True, ["bias_correction"]),
        (8, False, ["align", "output_mse"]),
        (16, True, []),
    ],
)
def test_the_default_methods(bits: int, per_channel: bool, names: list[str]) -> None:
    values = {"quantization.weight.bitwidth": bits, "quantization.weight.per_channel": per_channel}
    found = config.default_methods(config.with_values(RunConfig(), values))
    assert [choice.name for choice in found] == names


class _Notes:
    """What a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def track(self, items: Iterable[Any], title: str, total: int | None = None) -> Iterator[Any]:
        yield from items

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("methods", "bits", "names", "words"),
    [
        (None, 4, "align gptq bias_correction", ""),
        (
            ["gpfq"],
            4,
            "align output_mse gpfq",
            "gpfq: behind align, output_mse, in place of the default (align, ",
        ),
        (
            ["adaround", "bias_correction"],
            4,
            "align output_mse adaround bias_correction",
            "adaround, bias_corr",
        ),
        (["qdrop"], 8, "bias_correction qdrop", "qdrop: behind bias_correction; `none` in front leaves these out"),
        (["bn_reestimation"], 4, "align gptq bias_correction bn_reestimation", "bn_reestimation: behind"),
        (["bias_correction"], 4, "align gptq bias_correction", "bias_correction: behind align, gptq; `none`"),
        (
            ["bias_correction", "adaround"],
            4,
            "align output_mse bias_correction adaround",
            "bias_correction, adaround",
        ),
        (["bias_correction", "ternary"], 2, "align output_mse bias_correction ternary", "bias_correction, ternary: be"),
        (["gptq"], 4, "gptq", "the methods given replace the default (align, gptq, bias_correction)"),
        (["bias_correction"], 8, "bias_correction", ""),
        (["gpfq", "bias_correction"], 8, "gpfq bias_correction", ""),
        (["none", "gpfq"], 4, "gpfq", ""),
        (["none"], 4, "", ""),
        ([], 4, "", ""),
        (
            ["output_mse", "qdrop"],
            4,
            "output_mse qdrop",
            "the methods given replace the default (align, gptq, bias_correction)",
        ),
        (["lapq"], 8, "lapq", "the methods given replace the default (bias_correction); to keep it, name it in front"),
        (["auto"], 4, "auto", ""),
        (["gpfq"], 16, "gpfq", ""),
    ],
    ids=str,
)
def test_methods_that_build_on_exponents_stand_behind_the_default(methods, bits, names, words):  # type: ignore[no-untyped-def]
    given, heard = configured("x.safetensors", methods, bits), _Notes()
    found = with_chain(given, config.default_methods(given), heard)
    assert [choice.name for choice in found.ptq.applied] == names.split()
    assert len(heard.notes) == bool(words)
    assert all(note.startswith(words) for note in heard.notes)
    read = config.from_mapping(yaml.safe_load(config.dump(found)))
    assert with_chain(read, config.default_methods(read)) == found, "a run is repeated from its config.yaml"


@pytest.mark.parametrize(("bits", "names"), [(4, ["align", "output_mse"]), (8, ["bias_correction"]), (16, [])])
def test_what_is_trained_is_not_rounded_by_default(bits: int, names: list[str]) -> None:
    made = config.with_values(RunConfig(), {"quantization.weight.bitwidth": bits})
    assert [choice.name for choice in to_train(made)] == names


def test_chosen_methods_are_repeated_as_they_are() -> None:
    for methods in (("bias_correction",), ("gpfq", "bias_correction"), ("align", "gpfq"), ()):
        chain = tuple(Choice(name) for name in methods)
        made = fixed(config.with_values(RunConfig(), {"quantization.weight.bitwidth": 4}), chain)
        assert made.ptq.applied == chain
        assert with_chain(made, config.default_methods(made)) == made


def test_both_doors_put_the_default_in_front(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounding = ["--method", "bn_reestimation", "--weight-bits", "4", "--weights", weights, "--max-eval-batches", "2"]
    short = ["--max-calibration-batches", "2", "--output"]
    assert main(["ptq", *rounding, *short, str(tmp_path / "run")]) == 0
    assert "bn_reestimation: behind align, gptq, bias_correction" in capsys.readouterr().err
    assert main(["ptq", "--method", "none", *rounding, *short, str(tmp_path / "alone")]) == 0
    steps = [json.loads((tmp_path / f / "report.json").read_text())["pipeline_steps"] for f in ("run", "alone")]
    assert steps[0] == ["align", "calibrate", "gptq", "bias_correction", "bn_reestimation", "export"]
    assert steps[1] == ["calibrate", "bn_reestimation", "export"]
    assert main(["validate", str(tmp_path / "alone"), "--max-eval-batches", "1"]) == 0
    more = {"model": {"weights": weights}, "ptq": {"calibration_batches": 2, "max_eval_batches": 2}}
    for methods, expected in zip(("bn_reestimation", ["none", "bn_reestimation"]), steps, strict=True):
        result = quantize(bits="w4a8", methods=methods, config=more, progress=False)
        assert result.report["pipeline_steps"] == expected


def test_rewrites_come_before_the_backend_and_validate_repeats_them(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = ["--method", "doubling", "--method", "counting", "--method", "bias_correction"]
    short = ["--weights", weights, "--max-calibration-batches", "2", "--max-eval-batches", "2"]
    assert main(["ptq", *short, *chain, "--output", str(tmp_path / "run")]) == 0
    assert "128 and 128 images" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pipeline_steps"] == ["doubling", "calibrate", "counting", "bias_correction", "export"]
    assert report["final_sqnr_db"] == pytest.approx(0, abs=0.5), "the logits are twice the float network's"
    assert main(["validate", str(tmp_path / "run"), "--max-eval-batches", "2"]) == 0


def test_a_rewrite_behind_a_method_is_an_error(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="doubling rewrites the float network; put it before counting"):
        runs.ptq(configured(weights, ["counting", "doubling"]), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"ptq.methods.output_mse.candidates: 1 is not legal; legal: an integer from"):
        runs.ptq(configured(weights, [{"output_mse": {"candidates": 1}}]), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_no_method_from_the_command_line(weights: str, tmp_path: Path) -> None:
    short = ["--weights", weights, "--max-calibration-batches", "2", "--max-eval-batches", "2", "--weight-bits", "4"]
    assert main(["ptq", *short, "--method", "none", "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pipeline_steps"] == ["calibrate", "export"]


def test_list_shows_paper_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods["doubling"] == "A rewrite: doubles the last layer. Parameters: factor: 2.0."
    assert "Nagel et al. 2020" in methods["output_mse"]
    assert methods["output_mse"].endswith("Parameters: candidates: 5, centered: true, bias: true.")


@pytest.mark.parametrize("method", ["bias_correction", "gptq", "lapq", "adaround"])
@pytest.mark.parametrize("name", ["output", "x"])
def test_layers_with_the_name_of_an_input_or_the_output(method: str, name: str) -> None:
    """In a graph, these are nodes with a target, as calls of modules are."""

    class Named(torch.nn.Module):
        def __init__(self, last: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = torch.nn.Linear(5, 4), last
            self.add_module(last, torch.nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.last)(torch.relu(self.first(x)))

    torch.manual_seed(1)
    data, probe = torch.randn(32, 5), torch.randn(64, 5)
    parameters = QUICK.get(method, {})
    results = [
        quantize(Named(n), data, bits="w2a8", methods=[{method: parameters}], progress=False).model(probe)
        for n in (name, "plain")
    ]
    assert torch.equal(*results)
