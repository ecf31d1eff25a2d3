"""Chains of methods as the command line writes them, the simulations behind them, and the choice that `auto` makes."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pow2quant import prepare, simulate
from pow2quant.backends.base import Simulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import Choice, QuantPlan, RunConfig, parameters, with_values
from pow2quant.methods.auto import Auto, Chain, Trial, best
from pow2quant.plugins import resolve
from pow2quant.runs import choosing


def methods(chain: str) -> tuple[Choice, ...]:
    """What `a, b: {key: value}` or `a+b` stands for."""
    listed = [] if chain == "none" else yaml.safe_load(f"[{chain.replace('+', ', ')}]")
    return with_values(RunConfig(), {"ptq.methods": listed}).ptq.methods or ()


def written(chain: Iterable[Choice]) -> str:
    """The one way in which a chain is written."""
    texts = [
        f"{name}: {yaml.safe_dump(dict(values), default_flow_style=True, width=1000).strip()}" if values else name
        for name, values in chain
    ]
    return ", ".join(texts) or "none"


def auto(chain: str) -> Auto | None:
    """The method of a chain that chooses others, if it has one."""
    for name, values in methods(chain):
        if hasattr(found := resolve("methods", name), "choose"):
            made: Auto = parameters(found, values, name)
            return made
    return None


class Chains:
    """Simulations of a network after chains of methods.

    What a chain has in common with one before, from its beginning and as far as no random number is drawn, is kept.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, batches
        self._kept: dict[tuple[str, ...], tuple[Simulation, float]] = {}

    def simulation(
        self, chain: str, plan: QuantPlan, backend: str = "custom", seed: int = 0
    ) -> tuple[Simulation, float, bool]:
        """The simulation, the process's seconds that it took (those of what was kept, too), and whether by chance."""
        torch.manual_seed(seed)
        seeded = torch.get_rng_state()
        choices = methods(chain)
        made = [parameters(resolve("methods", name), values, name) for name, values in choices]
        rewrites = [method for method in made if hasattr(method, "rewrite")]
        keys = [(str(plan), backend, written(choices[:n])) for n in range(len(made) + 1)]
        done = next((n for n in reversed(range(len(rewrites), len(keys))) if keys[n] in self._kept), None)
        started = time.process_time()
        if done is None:
            begin, sim, before = len(rewrites), self._calibrated(rewrites, plan, backend), 0.0
        else:
            kept, before = self._kept[keys[done]]
            begin, sim = done, copy.deepcopy(kept)
        for n in range(begin, len(made) + 1):
            if n > begin:
                made[n - 1].apply(sim, self.batches)
            if n != done and backend == "custom" and torch.equal(torch.get_rng_state(), seeded):
                self._kept[keys[n]] = copy.deepcopy(sim), before + time.process_time() - started
        return sim, before + time.process_time() - started, not torch.equal(torch.get_rng_state(), seeded)

    def _calibrated(self, rewrites: Sequence[Any], plan: QuantPlan, backend: str) -> Simulation:
        network = fold_batch_norm(prepare(self.model, self.batches[0][:1]))
        for method in rewrites:
            more = {"plan": plan} if "plan" in inspect.signature(method.rewrite).parameters else {}
            network = method.rewrite(network, self.batches, **more)
        sim = simulate(network, self.batches[0][:1], plan, backend)
        sim.calibrate(self.batches)
        return sim

    def choice(self, chooser: Auto, plan: QuantPlan, backend: str = "custom", seed: int = 0) -> tuple[str, float]:
        """The chain that `auto` chooses on these images, and the process's seconds that its trials took."""
        quantization = RunConfig().quantization
        config = replace(RunConfig(), quantization=replace(quantization, weight=plan.weight, output=plan.output))

        batches = choosing.some(self.batches, chooser.images)

        @cache
        def halves(part: int) -> tuple[Chains, list[Tensor]]:
            seen, held_back = choosing.split(batches, chooser.held_back, part)
            return Chains(self.model, seen), held_back

        def attempt(chain: Chain, part: int) -> Trial:
            chains, held_back = halves(part)
            sim, seconds, _ = chains.simulation(written(chain), plan, backend, seed)
            return Trial(chain, choosing.noise(sim.model, self.model, held_back, torch.device("cpu")), seconds)

        tried = chooser.choose(choosing.facts(self.model, config), attempt, lambda line: print(line, flush=True))
        return written(best(tried).chain), sum(trial.seconds for trial in tried)
