"""Mixed precision: sensitivities, an integer program, and plans that are verified by quantizing and evaluating them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pow2quant import config as configuration
from pow2quant import run_folder
from pow2quant.artifact import Artifact
from pow2quant.backends.base import SILENT, Progress, Simulation, inputs
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError
from pow2quant.logits.paired import wilson
from pow2quant.report import summary
from pow2quant.runs import Job, Result, Simulated, finish, write_report
from pow2quant.runs.chains import fixed, with_chain
from pow2quant.runs.choosing import decided
from pow2quant.runs.unfinished import NOTHING, Unfinished, beside
from pow2quant.saving import write
from pow2quant.study import costs, latency, limits
from pow2quant.study.candidates import CANDIDATES, Group, Plan, configured, groups_of, sorted_names, uniform
from pow2quant.study.costs import Chip, LayerShape
from pow2quant.study.front import Point, draw, front, table
from pow2quant.study.judging import Judge
from pow2quant.study.limits import Request
from pow2quant.study.program import Problem
from pow2quant.study.sensitivity import Measurement, Table, csv_of, expected_loss
from pow2quant.study.sweep import BEST, best_text
from pow2quant.training.schedule import criterion_of

PLAN, CHIP = "plan.yaml", "latency.yaml"

REFINEMENTS = 3
"""Plans between the cheapest that is accurate enough and the dearest that is not."""

REPAIRS = 4
"""Plans that are reached from one that is not accurate enough by widening one tensor after the other."""


@dataclass(frozen=True)
class Found:
    """A finished search: the run of the chosen plan, and the points that were evaluated."""

    result: Result
    chosen: Point
    points: tuple[Point, ...]
    layers: list[dict[str, Any]]


def search(config: RunConfig, output: Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Found:
    """Searches a plan as `config.search` says, and runs it as `runs.ptq` would.

    Killed, the same call continues it, to the bits of a search that was not interrupted; latencies are timed again.
    The run's folder also holds the plan and what led to it. Raises Pow2QuantError for everything that a user can fix,
    a constraint that cannot be met among it; then `output` is as it was before.
    """
    started = time.monotonic()
    with run_folder.staged(output, overwrite) as folder, beside(output) as kept:
        work = Search.start(config, progress, kept)
        chosen = work.best()
        job = work.job_of(chosen.plan)
        sim = work.quantized(job, progress)
        report, agreements = finish(job, sim, folder, ["search", *job.steps, "export"])
        document = _with_intervals(work.document(chosen), report["evaluation"])
        work.write(folder, chosen, document)
        report["ptq_accuracy"] = report["final_accuracy"]
        report["search"] = document
        report["duration_seconds"] = round(time.monotonic() - started, 2)
        write_report(folder, report)
    return Found(
        Result(output, report, tuple(agreements), Simulated(sim, job.example)),
        chosen,
        tuple(work.points.values()),
        document["layers"],
    )


def _with_intervals(document: dict[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """search.json with what was measured on how many images, and 95 % intervals of what is a share of them."""
    document["evaluated"] = summary.evaluated(evaluation)
    for point in document["points"]:
        ends = wilson(point["accuracy"] / 100, evaluation["images"]) if document["metric"] == "top1" else None
        point["interval"] = None if ends is None else [round(100 * end, 4) for end in ends]
    return document


@dataclass
class Search:
    """A search at work.

    problem: the integer program; its quantity `loss` comes with the sensitivities. initial: the float network's metric.
    simulations: by role and candidate. points: by plan.
    """

    request: Request
    job: Job
    groups: tuple[Group, ...]
    layers: tuple[LayerShape, ...]
    problem: Problem
    chip: Chip | None
    sensitivities: Table
    initial: float
    random_state: torch.Tensor
    progress: Progress
    judge: Judge
    simulations: dict[tuple[str, str], Simulation] = field(default_factory=dict)
    points: dict[tuple[str, ...], Point] = field(default_factory=dict)

    @classmethod
    def start(cls, config: RunConfig, progress: Progress, unfinished: Unfinished = NOTHING) -> Search:
        """Costs first, since they may tell that nothing can be found; then the sensitivities."""
        request = Request(config.search, config.metric)
        narrow = any(CANDIDATES[name].bits < 8 for name in config.search.candidates)
        config = with_chain(config, METHODS if narrow else (), progress)
        config = fixed(config, config.ptq.methods or ())
        job = replace(decided(Job.start(config, progress)), unfinished=unfinished)
        state = torch.get_rng_state()
        plan = configuration.plan_of(config)
        sim = job.simulate()
        offered = config.search.candidates, config.search.activation_candidates
        groups = groups_of(sim.network, sim.placement, plan, *offered)
        if not any(g.is_open for g in groups):
            raise ConfigError("candidates: nothing is left to choose; every tensor's width is decided by overrides")
        layers = costs.layers_of(sim.network, sim.placement, groups)
        judge = Judge.of(job, limits.metric_named(request.constraints), unfinished)
        work = cls(request, job, groups, layers, Problem({}, {}), None, {}, 0.0, state, progress, judge)
        work.chip = work._chip()
        names = {g.name: g.candidates for g in groups}
        try:
            quantities = costs.quantities(layers, groups, work.chip)
        except ConfigError as error:
            raise ConfigError(f"{config.search.latency_table}: {error}") from None
        work.problem = Problem(names, quantities)
        work._check_costs()
        work.initial = work.sign * judge.original
        limits.accuracy_floor(request.constraints, work.initial, judge.metric)  # refused before anything is measured
        work._quantize()
        work.measure(config.search.sensitivity)
        return work

    def job_of(self, plan: Plan) -> Job:
        """The job whose configuration asks for a plan."""
        return replace(self.job, config=configured(self.job.config, self.groups, plan))

    def quantized(self, job: Job, progress: Progress = SILENT, name: str = "plan") -> Simulation:
        """The simulation that `ptq` makes of this job's configuration, to the bit: from the same random state."""
        torch.set_rng_state(self.random_state)
        return replace(job, progress=progress).quantized(name)

    def best(self) -> Point:
        """The best of the plans that were verified. Raises ConfigError, with what can be reached, where none is."""
        budgets = self._budgets()
        for budget in self.progress.track(budgets, "verifying plans", len(budgets)):
            plan = self.problem.least("loss", {**self.ceilings, self.request.axis: budget})
            if plan is not None:
                self._verify(plan)
        if not self._good() and self.points:
            self._repair(self._most_accurate(), REPAIRS)
        good = self._good()
        if not good:
            raise ConfigError(self._unreachable())
        if self.request.search.objective == "accuracy":
            return max(good, key=lambda p: (p.accuracy, -p.costs[self.request.axis]))
        return self._refined(min(good, key=self._cost))

    @property
    def ceilings(self) -> dict[str, float]:
        """The bounds on costs."""
        return limits.ceilings(self.request.constraints)

    @property
    def sign(self) -> int:
        """What makes more of the metric better."""
        return 1 if self.judge.metric.higher_is_better else -1

    @property
    def floor(self) -> float | None:
        """The quality asked for: the metric with the sign."""
        return limits.accuracy_floor(self.request.constraints, self.initial, self.judge.metric)

    def _said(self, quality: float | None) -> str:
        return "" if quality is None else self.judge.metric.text(self.sign * quality)

    def document(self, chosen: Point) -> dict[str, Any]:
        """search.json."""
        by_site = {name: g.name for g in self.groups for name in g.sites}
        layers = [
            {
                "layer": y.name,
                **dict(zip(("weight", "input"), y.widths(chosen.plan), strict=True)),
                "weights": y.weights,
                "macs": y.macs,
            }
            for y in self.layers
        ]
        points = sorted(self.points.values(), key=self._cost)
        undominated = front(points, self.request.axis)
        return {
            "objective": self.request.search.objective,
            "constraints": [c.text for c in self.request.constraints],
            "sensitivity": self.request.search.sensitivity,
            "candidates": list(self.request.search.candidates),
            "activation_candidates": list(self.request.search.activation_candidates),
            "chip": None if self.chip is None else self.chip.name,
            "axis": self.request.axis,
            "metric": self.judge.metric.name,
            "unit": self.judge.metric.unit,
            "higher_is_better": self.judge.metric.higher_is_better,
            "float_accuracy": self.sign * self.initial,
            "accuracy_floor": None if self.floor is None else self.sign * self.floor,
            "chosen": chosen.to_json(),
            "points": [
                p.to_json()
                | {"change": round(p.value - self.sign * self.initial, 4), "change_interval": p.interval}
                | {"on_front": p in undominated, "chosen": p == chosen}
                for p in points
            ],
            "plan": {name: chosen.plan[group] for name, group in by_site.items()},
            "layers": layers,
        }

    def write(self, folder: Path, chosen: Point, document: Mapping[str, Any]) -> None:
        """The plan, and what led to it."""
        points, axis = list(self.points.values()), self.request.axis
        texts = {
            **{name: best_text(configured(self.job.config, self.groups, chosen.plan), name) for name in (PLAN, BEST)},
            run_folder.SEARCH: json.dumps(document, indent=2) + "\n",
            "pareto.csv": table(points, axis, chosen),
            "sensitivity.csv": csv_of(self.sensitivities, self.request.search.sensitivity),
        }
        if self.chip is not None:
            texts[CHIP] = latency.dump(self.chip)
        for name, text in texts.items():
            write(folder / name, text.encode())
        write(folder / "pareto.png", draw(points, axis, chosen, self.initial, self.floor, self.judge.metric))

    def _chip(self) -> Chip | None:
        if self.request.search.latency_table is not None:
            return costs.load_chip(Path(self.request.search.latency_table))
        if not self.request.needs_latency:
            return None
        return latency.measured(self._networks(), self.layers, "onnxruntime on this machine")

    def _networks(self) -> Iterator[tuple[Plan, Artifact]]:
        """The whole network at every pair of widths whose weights are stored differently: in 4, 8, 16 bits or float."""
        stored = {CANDIDATES[name].stored: name for name in sorted_names(self.request.search.candidates)}
        pairs = [(w, a) for w in stored.values() for a in self.request.search.activation_candidates or (None,)]
        for weight, output in self.progress.track(pairs, "timing layers in onnxruntime", len(pairs)):
            plan = uniform(self.groups, "weight", weight)
            plan |= {g.name: output for g in self.groups if g.role == "output" and output in g.candidates}
            sim = self.job_of(plan).simulate()
            sim.calibrate([self.job.example])
            yield plan, sim.export(self.job.example)

    def _check_costs(self) -> None:
        """Raises ConfigError for a bound on costs that no plan is within, or two that contradict each other."""
        within: dict[str, float] = {}
        for c in self.request.constraints:
            if c.quantity not in self.ceilings:
                continue
            least = self.problem.least(c.quantity, within)
            assert least is not None
            value = self.problem.value(c.quantity, least)
            if value > c.value:
                others = " ".join(d.text for d in self.request.constraints if d.quantity in within)
                raise ConfigError(
                    f"constraint {c.text} cannot be met: the least that these candidates reach"
                    f"{f' with {others}' if others else ''} is {c.quantity}={limits.SHOWN[c.quantity](value)}"
                )
            within[c.quantity] = min(c.value, within.get(c.quantity, c.value))

    def _quantize(self) -> None:
        """A simulation for every candidate, and the accuracies of uniform widths on the way."""
        wanted = [
            (role, name)
            for role in ("weight", "output")
            for name in dict.fromkeys(n for g in self.groups if g.role == role and g.is_open for n in g.candidates)
            if CANDIDATES[name].spec is not None
        ]
        for role, name in self.progress.track(wanted, "quantizing with every candidate", len(wanted)):
            plan = uniform(self.groups, role, name)
            self.simulations[role, name] = sim = self.quantized(self.job_of(plan), name=f"{role}-{name}")
            if role == "weight":
                self._add(plan, f"uniform {name}", partial(getattr, sim, "model"))

    def measure(self, metric: str) -> None:
        """Takes sensitivities by a metric as what is predicted to be lost."""
        job, device = self.job, self.job.device
        batches = [
            (tuple(x.to(device) for x in inputs(batch)), y.to(device) if isinstance(y, torch.Tensor) else y)
            for batch, y in islice(job.data.calibration, self.request.search.sensitivity_batches)
        ]
        criterion = criterion_of(job.config.training, job.task.loss or "MSELoss")
        if isinstance(criterion, torch.nn.Module):
            criterion.to(device)
        measurement = Measurement(
            self.groups, self.simulations, batches, criterion, job.config.seed, self.progress, self.judge.numbers.get
        )
        self.sensitivities = measurement.table(metric)
        quantities = {**self.problem.quantities, "loss": expected_loss(self.sensitivities)}
        self.problem = replace(self.problem, quantities=quantities)
        self.points = {key: replace(p, loss=self.problem.value("loss", p.plan)) for key, p in self.points.items()}

    def _verify(self, plan: Plan) -> Point:
        key = tuple(plan.values())
        if key not in self.points:
            self._add(plan, "found", lambda: self.quantized(self.job_of(plan)).model)
        return self.points[key]

    def _add(self, plan: Plan, kind: str, make: Callable[[], nn.Module]) -> None:
        judged = self.judge.judged(f"plan {' '.join(plan.values())}", make)
        values = {name: self.problem.value(name, plan) for name in self.problem.quantities}
        loss, accuracy = values.pop("loss", 0.0), self.sign * judged.value
        self.points[tuple(plan.values())] = Point(kind, dict(plan), accuracy, loss, values, self.sign, judged.interval)

    def _budgets(self) -> list[float]:
        """From the least that is possible to the most, or to the bound."""
        axis = self.request.axis
        least = self.problem.least(axis, self.ceilings)
        assert least is not None
        low, high = self.problem.value(axis, least), self.problem.value(axis, uniform(self.groups, ""))
        high = max(low, min(high, self.ceilings.get(axis, high)))
        return [float(b) for b in np.geomspace(low, high, self.request.search.points + 1)[1:-1]] + [high]

    def _cost(self, point: Point) -> float:
        return point.costs[self.request.axis]

    def _good(self) -> list[Point]:
        floor = -np.inf if self.floor is None else self.floor
        return [p for p in self._within() if p.accuracy >= floor]

    def _within(self) -> list[Point]:
        return [p for p in self.points.values() if self.problem.meets(p.plan, self.ceilings)]

    def _most_accurate(self) -> Point:
        return max(self._within(), key=lambda p: p.accuracy)

    def _refined(self, best: Point) -> Point:
        """Something cheaper that is still accurate enough, if there is: by halving, then by widening step by step."""
        axis = self.request.axis
        failing = [p for p in self._within() if self._cost(p) < self._cost(best)]
        below = max(failing, key=self._cost, default=None)
        for _ in range(REFINEMENTS if below is not None else 0):
            assert below is not None
            budget = (self._cost(below) + self._cost(best)) / 2
            plan = self.problem.least("loss", {**self.ceilings, axis: budget})
            if plan is None or tuple(plan.values()) in self.points:
                break
            point = self._verify(plan)
            self.progress.note(f"verified {axis}={limits.SHOWN[axis](self._cost(point))}: {self._said(point.accuracy)}")
            if point in self._good():
                best = point
            else:
                below = point
        if below is not None:
            self._repair(below, REPAIRS, cheaper_than=self._cost(best))
        return min(self._good(), key=self._cost)

    def _repair(self, point: Point, steps: int, cheaper_than: float = np.inf) -> None:
        """Widens tensor after tensor, the most predicted gain for its cost first, until it is accurate enough."""
        axis = self.request.axis
        for plan in islice(self.problem.raised(point.plan, "loss", axis, self.ceilings), steps):
            if self.problem.value(axis, plan) >= cheaper_than:
                return
            repaired = self._verify(plan)
            cost = limits.SHOWN[axis](self._cost(repaired))
            self.progress.note(f"repaired {axis}={cost}: {self._said(repaired.accuracy)}")
            if repaired in self._good():
                return

    def _unreachable(self) -> str:
        asked = " ".join(c.text for c in self.request.constraints if c.is_quality)
        others = " ".join(c.text for c in self.request.constraints if c.quantity in self.ceilings)
        best = self._most_accurate()
        return (
            f"constraint {asked} cannot be met{f' with {others}' if others else ''}: asked for "
            f"{self._said(self.floor)}, the best reachable is {self._said(best.accuracy)} (float: "
            f"{self._said(self.initial)}); wider candidates or other methods may help"
        )


METHODS = (configuration.Choice("output_mse"), configuration.Choice("bias_correction"))
"""The default methods of a search, where a candidate has less than 8 bits. No rewrite is among them: one would have to
know the widths that are searched."""
