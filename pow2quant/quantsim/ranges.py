"""Ranges that are trained with `sim.model` on `custom`, for the schemes `training_range_learning_…` (TQT)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from pow2quant.backends.base import Simulation
from pow2quant.training.exponents import Exponents

if TYPE_CHECKING:
    from pow2quant.artifact import Site, Table


class Trained(Protocol):
    """The simulation whose ranges are trained; see `members.Members`."""

    simulation: Simulation
    frozen: frozenset[str]

    @property
    def sites(self) -> Sequence[Site]: ...
    def derive_biases(self) -> None: ...


class Ranges:
    """The exponents of a simulation as parameters of its model, `sim.model.learned_ranges`; zero points stay.

    They are there from the start and stay the same objects; without an encoding they have no effect. Where gradients
    are enabled, values are quantized with gradients for them (see `training.exponents`); in eval mode with the
    simulation's bits. What an optimizer has made of them holds from the next call of the model on, in `state_dict()`,
    and in what is read, saved and exported. Frozen encodings are not trained; a copy of the model alone trains none.
    """

    def __init__(self, sim: Trained, model: nn.Module) -> None:
        self._sim = weakref.ref(sim)
        self._model: Any = model
        self._exponents: Exponents | None = None
        self._known: Table = {}
        self._values = torch.empty(0)
        self._taps, self._rests = ExitStack(), False
        leader = sim.simulation.placement.leader
        names = list(dict.fromkeys(leader(site.name) for site in sim.sites if site.role != "bias"))
        held = getattr(model, "learned_ranges", None)  # those of a copy of the simulation
        model.learned_ranges = nn.ParameterList() if held is None else held
        self._parameters = dict(zip(names, [] if held is None else cast(nn.ParameterList, held), strict=False))
        self._add(names)
        model.register_state_dict_pre_hook(_Hook(self.follow))
        model.register_forward_pre_hook(_Hook(self._enter))
        model.register_forward_hook(_Hook(self._leave), always_call=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def _add(self, names: Sequence[str]) -> None:
        """Parameters for leading sites that have none yet."""
        device = next((p.device for p in self._model.parameters()), None)
        for name in names:
            if name not in self._parameters:
                self._parameters[name] = nn.Parameter(torch.zeros((), device=device))
                self._model.learned_ranges.append(self._parameters[name])

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within it, while encodings are chosen, nothing is taken over."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def follow(self) -> None:
        """Takes over the encodings where these were changed, else what an optimizer has made of the parameters."""
        sim = self._sim()
        if sim is None or self._rests:
            return
        table = sim.simulation.encodings()
        names = {s.name for s in sim.sites if s.role != "bias" and s.name in table} - sim.frozen
        names = {name for name in names if sim.simulation.placement.leader(name) in names}
        held = set(self._exponents or ())
        if names != held or any(self._known[name] is not table[name] for name in names):
            self._start(sim, table, [name for name in table if name in names])
        elif self._exponents is not None and not torch.equal(self._exponents.values, self._values):
            self._exponents.advance()
            self._take(sim, self._exponents)

    def _start(self, sim: Trained, table: Table, names: list[str]) -> None:
        held = {name: self._known[name].scale.shape for name in self._exponents or ()}
        if self._exponents is not None and held == {name: table[name].scale.shape for name in names}:
            self._exponents.restart(table)
        else:
            self._exponents = Exponents(sim.simulation, names, "tqt") if names else None
            if self._exponents is not None:
                self._add([sim.simulation.placement.leader(name) for name in names])  # another may lead by now
                self._exponents.bind(self._parameters)
        if self._exponents is not None:
            self._take(sim, self._exponents)

    def _take(self, sim: Trained, exponents: Exponents) -> None:
        self._values = exponents.values.clone()
        sim.simulation.load(sim.simulation.encodings() | exponents.table())
        self._known = sim.simulation.encodings()
        sim.derive_biases()

    def _enter(self) -> None:
        sim = self._sim()
        self.follow()
        if sim is not None and self._exponents is not None and torch.is_grad_enabled():
            self._taps.enter_context(sim.simulation.intercept(self._quantize))

    def _leave(self) -> None:
        self._taps.close()

    def _quantize(self, site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        exponents = self._exponents
        if exponents is None or site.name not in exponents:
            return quantized
        learned = exponents.quantize(site.name, x, shares_batch=site.role != "weight")
        return learned if self._model.training else quantized.detach() + (learned - learned.detach())


class _Hook:
    """What is done around a call. In a copy of the model it does nothing."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def __call__(self, *_: Any) -> None:
        self._act()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing() -> None:
    pass
