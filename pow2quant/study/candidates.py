"""What may be chosen for a tensor, for which tensors together, and how a choice is written into a configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from pow2quant import config as configuration
from pow2quant.artifact import Site
from pow2quant.backends.placement import Placement
from pow2quant.config import QuantPlan, RunConfig
from pow2quant.errors import ConfigError

Plan = Mapping[str, str]
"""The name of the candidate that every group takes, by the group's name."""


@dataclass(frozen=True)
class Candidate:
    """A representation of a tensor. bits: of one stored value. spec: over its role's in `overrides`; None: float."""

    name: str
    bits: int
    spec: Mapping[str, Any] | None

    @property
    def stored(self) -> str:
        """What an ONNX file stores a weight in: bits, or a float's name."""
        return self.name if self.spec is None else str(next(bits for bits in (4, 8, 16) if self.bits <= bits))


CANDIDATES: dict[str, Candidate] = {
    **{str(bits): Candidate(str(bits), bits, {"bitwidth": bits}) for bits in configuration.WIDTHS["weight"]},
    "float16": Candidate("float16", 16, None),
    "float32": Candidate("float32", 32, None),
}
"""By name, from the narrowest up. A float16 weight is computed as float32: its own rounding is not seen."""


@dataclass(frozen=True)
class Group:
    """Tensors that take one candidate together: a weight and its repeated uses, an activation and what is tied to it.

    name: of the first site. role: `weight` or `output`. sites: by name. candidates: names, from the narrowest up; a
    single one where the configuration has decided already.
    """

    name: str
    role: str
    sites: tuple[str, ...]
    candidates: tuple[str, ...]

    @property
    def is_open(self) -> bool:
        """Whether there is something to choose."""
        return len(self.candidates) > 1


def groups_of(
    network: fx.GraphModule, placement: Placement, plan: QuantPlan, weights: Collection[str], outputs: Collection[str]
) -> tuple[Group, ...]:
    """Every weight and every activation of a network, in order of computation.

    weights, outputs: the candidates' names. What an override speaks of keeps what the override says, and activations
    keep their width where `outputs` is empty.
    """
    groups: dict[str, Group] = {}
    for name, role, leader in _tensors(network, placement):
        if leader in groups:
            groups[leader] = replace(groups[leader], sites=(*groups[leader].sites, name))
            continue
        site, spec = Site(name, role), placement.specs.get(name)
        offered = sorted_names(weights if role == "weight" else outputs)
        kept = (str(spec.bits) if spec is not None else "float32",)
        fixed = spec is None or not offered or _is_overridden(site, plan)
        groups[name] = Group(name, role, (name,), kept if fixed else offered)
    return tuple(groups.values())


def sorted_names(names: Collection[str]) -> tuple[str, ...]:
    """From the narrowest up, each once. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in CANDIDATES:
            raise ConfigError(f"candidates: {name!r} is not legal; legal: {', '.join(CANDIDATES)}")
    return tuple(name for name in CANDIDATES if name in names)


def uniform(groups: Collection[Group], role: str, name: str | None = None) -> dict[str, str]:
    """Every group of the role at this candidate, all others at their widest; those that have decided keep theirs."""
    return {g.name: name if name in g.candidates and g.role == role else g.candidates[-1] for g in groups}


def configured(config: RunConfig, groups: Collection[Group], plan: Plan) -> RunConfig:
    """The configuration that asks for a plan: an override for every tensor that was open."""
    overrides: dict[str, Any] = {pattern: c and dict(c) for pattern, c in config.quantization.overrides.items()}
    for group in groups:
        for name in group.sites if group.is_open else ():
            spec = CANDIDATES[plan[group.name]].spec
            module = Site(name, group.role).module
            before = overrides.setdefault(module, {})
            before[group.role] = None if spec is None else dict(spec)
    return replace(config, quantization=replace(config.quantization, overrides=overrides))


def _tensors(network: fx.GraphModule, placement: Placement) -> Iterator[tuple[str, str, str]]:
    """(site, role, the site that it follows) of all weights and activations."""
    first: dict[int, str] = {}
    layers = {layer.module for layer in placement.layers}
    followers = set(placement.leaders)
    for node in network.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            name = f"{node.target}.weight"
            yield name, "weight", first.setdefault(id(network.get_parameter(name)), name)
        site = placement.quantized.get(node.name)
        if site is not None and site.role == "output" and site.name not in followers:
            tied = [s.name for s in placement.sites if s.name in followers and placement.leader(s.name) == site.name]
            for name in (site.name, *tied):
                yield name, "output", site.name


def _is_overridden(site: Site, plan: QuantPlan) -> bool:
    return any(
        fnmatchcase(site.module, pattern) and (changes is None or site.role in changes)
        for pattern, changes in plan.overrides
    )
