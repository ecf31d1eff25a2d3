"""The integer program: one candidate for every group, a quantity minimized, others within limits.

Exact: solved to optimality by HiGHS (Huangfu & Hall 2018), through `scipy.optimize.milp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from pow2quant.study.candidates import Plan

Floats = NDArray[np.float64]

TOLERANCE = 1e-9
"""A limit is met when it is exceeded by no more than this share of it."""

SLACK = 1e-6
"""Limits are narrowed by this share where the solver's own tolerance let a plan exceed one."""


@dataclass(frozen=True)
class Quantity:
    """What a plan costs of something: the sum of its parts, where a part depends on one group or on two.

    singles: by group, (K,). pairs: by two groups, (K, L). K, L: how many candidates they have.
    """

    singles: Mapping[str, Floats]
    pairs: Mapping[tuple[str, str], Floats]


@dataclass(frozen=True)
class Problem:
    """Which candidates every group has, and what they cost. quantities: by name; all parts finite."""

    candidates: Mapping[str, tuple[str, ...]]
    quantities: Mapping[str, Quantity]

    def value(self, name: str, plan: Plan) -> float:
        """A quantity of a plan."""
        at = {group: names.index(plan[group]) for group, names in self.candidates.items()}
        quantity = self.quantities[name]
        singles = (values[at[group]] for group, values in quantity.singles.items())
        return fsum([*singles, *(values[at[a], at[b]] for (a, b), values in quantity.pairs.items())])

    def meets(self, plan: Plan, limits: Mapping[str, float]) -> bool:
        """Whether a plan is within limits."""
        return all(self.value(name, plan) <= limit * (1 + TOLERANCE) for name, limit in limits.items())

    def least(self, name: str, limits: Mapping[str, float]) -> dict[str, str] | None:
        """The plan with the least of a quantity within limits (at most this much, by quantity); None: there is none."""
        found = _Milp(self).solve(name, limits)
        if found is not None and not self.meets(found, limits):  # by the solver's tolerance
            found = _Milp(self).solve(name, {quantity: limit * (1 - SLACK) for quantity, limit in limits.items()})
        return found

    def raised(self, plan: Plan, gain: str, cost: str, limits: Mapping[str, float]) -> Iterator[dict[str, str]]:
        """Plans from here up, a group to its next wider candidate at a time: greedily, the most gain for its cost.

        gain: the quantity that falls. Ends where nothing can be raised within the limits.
        """
        current = dict(plan)
        while True:
            steps = [s for s in self._steps(current) if self.meets(s, limits)]
            if not steps:
                return

            gains, costs = ([self.value(name, s) - self.value(name, current) for s in steps] for name in (gain, cost))
            worth = [-g / max(c, 1e-12) for g, c in zip(gains, costs, strict=True)]
            current = steps[int(np.argmax(worth))]
            yield current

    def _steps(self, plan: Plan) -> Iterator[dict[str, str]]:
        for group, names in self.candidates.items():
            at = names.index(plan[group])
            if at + 1 < len(names):
                yield {**plan, group: names[at + 1]}


class _Milp:
    """A problem in the solver's terms: a binary for every candidate, a share for every pair of two groups' candidates.

    A share p_kl is at most what x_k and y_l are, since sum_l p_kl = x_k and sum_k p_kl = y_l; so it is x_k y_l.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.start: dict[str | tuple[str, str], int] = {}
        self.size = 0
        for group, names in problem.candidates.items():
            self._add(group, len(names))
        self.binaries = self.size
        for pair in dict.fromkeys(p for q in problem.quantities.values() for p in q.pairs):
            self._add(pair, self._length(pair[0]) * self._length(pair[1]))

    def solve(self, name: str, limits: Mapping[str, float]) -> dict[str, str] | None:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        objective = self._row(name)
        exact = csr_array(np.array(list(self._equalities())))
        sides = np.array([1.0] * len(self.problem.candidates) + [0.0] * (exact.shape[0] - len(self.problem.candidates)))
        constraints = [LinearConstraint(exact, sides, sides)]
        for quantity, limit in limits.items():
            row = self._row(quantity)
            scale = max(np.abs(row).max(), 1e-300)
            constraints.append(LinearConstraint(csr_array(row[None] / scale), -np.inf, limit * (1 + TOLERANCE) / scale))
        found = milp(
            objective / max(np.abs(objective).max(), 1e-300),
            integrality=np.arange(self.size) < self.binaries,
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        return None if found.x is None else self._plan(found.x)

    def _add(self, key: str | tuple[str, str], length: int) -> None:
        self.start[key] = self.size
        self.size += length

    def _length(self, group: str) -> int:
        return len(self.problem.candidates[group])

    def _row(self, name: str) -> Floats:
        row = np.zeros(self.size)
        quantity = self.problem.quantities[name]
        parts: Iterable[tuple[str | tuple[str, str], Floats]] = [*quantity.singles.items(), *quantity.pairs.items()]
        for key, values in parts:
            row[self.start[key] : self.start[key] + values.size] += values.ravel()
        return row

    def _equalities(self) -> Iterator[Floats]:
        for group in self.problem.candidates:
            row = np.zeros(self.size)
            row[self.start[group] : self.start[group] + self._length(group)] = 1
            yield row
        for key, first in self.start.items():
            if isinstance(key, str):
                continue
            shares = first + np.arange(self._length(key[0]) * self._length(key[1])).reshape(self._length(key[0]), -1)
            for group, rows in zip(key, (shares, shares.T), strict=True):
                for i, taken in enumerate(rows):
                    row = np.zeros(self.size)
                    row[taken] = 1
                    row[self.start[group] + i] = -1
                    yield row

    def _plan(self, x: Floats) -> dict[str, str]:
        return {
            group: names[int(x[self.start[group] :][: len(names)].argmax())]
            for group, names in self.problem.candidates.items()
        }
