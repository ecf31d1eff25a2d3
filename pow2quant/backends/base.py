"""The seam: what a backend is. Everything above this file knows only this file.

A backend is one callable `(prepared network, example batch, plan) -> Simulation`; see `custom.py` for the short one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pow2quant.artifact import Artifact, Site, Table
from pow2quant.backends.placement import Placement
from pow2quant.config import QuantPlan
from pow2quant.frontends.batches import Batch as Batch
from pow2quant.frontends.batches import inputs as inputs

T = TypeVar("T")

Tap = Callable[[Site, Tensor, Tensor], Tensor]
"""(site, x, fake-quantized x) -> what flows on."""

Rewrite = Callable[[GraphModule, Iterable[Batch]], GraphModule]
"""A function-preserving change of the prepared float network, before a backend wraps it.

Which nodes and parameters there are afterwards follows from the graph alone, not from weights or data: a finished run
is rebuilt from its configuration, around the weights that it saved.
"""

ALL: frozenset[str] = frozenset({"weight", "input", "output", "bias"})


class Simulation(Protocol):
    """A network that computes as the quantized one will.

    model: fake-quantizing; the user's submodule names; `.weight` and `.bias` are float and trainable.
    sites: every tensor that is quantized, in order of computation.
    network: the prepared float network that is simulated, as it was handed over: what a method aims at.
    placement: which node of `network` is quantized by which site, and how: what `placement.place` says.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def sites(self) -> Sequence[Site]: ...

    @property
    def network(self) -> GraphModule: ...

    @property
    def placement(self) -> Placement: ...

    def parameter(self, name: str) -> Tensor:
        """The float parameter of the model with this name in the prepared network, such as a weight's site name."""
        ...

    def calibrate(self, batches: Iterable[Batch], roles: Collection[str] = ALL) -> Table:
        """Chooses the encodings of the sites with these roles; the other roles stay bit-identical.

        Weights need no data. Activations are observed unquantized, behind float weights when those are chosen too,
        otherwise behind quantized ones. Returns `encodings()`.
        Raises DataError for an empty iterable or NaN, EncodingError when a bias cannot be represented.
        """
        ...

    def encodings(self) -> Table:
        """The encodings by site name; sites that have none yet are absent."""
        ...

    def load(self, table: Table) -> None:
        """Takes over encodings; afterwards `encodings() == table`, bit for bit.

        Raises EncodingError for a site that the network does not have or that would be left without an encoding.
        """
        ...

    def intercept(self, tap: Tap) -> AbstractContextManager[None]:
        """Within the context every site's value is what `tap(site, x, fake_quantized_x)` returns."""
        ...

    def export(self, example: Batch) -> Artifact:
        """The float ONNX with on-grid weights and the encodings by ONNX tensor name."""
        ...


Backend = Callable[[GraphModule, Batch, QuantPlan], Simulation]


class Progress(Protocol):
    """Where long work says how far it is."""

    def track(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        """Passes items on while showing a bar."""
        ...

    def note(self, text: str) -> None:
        """Shows one line."""
        ...


class _Silent:
    def track(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def note(self, text: str) -> None:
        pass


SILENT: Progress = _Silent()


class Marks(Protocol):
    """Where a method that goes part by part says how far it is, so that a killed run can continue behind a part."""

    @property
    def parts(self) -> int:
        """So many parts are done already, in the simulation too."""
        ...

    def mark(self, sim: Simulation, parts: int) -> None:
        """So many parts are done now."""
        ...


class _Unmarked:
    parts = 0

    def mark(self, sim: Simulation, parts: int) -> None:
        pass


UNMARKED: Marks = _Unmarked()


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. The host goes on while a GPU fetches it: it lies in memory that the GPU reads by itself."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Tapped(Protocol):
    """A quantizer that passes its values through `tap`, where it has one."""

    tap: Tap | None


@contextmanager
def tapping(quantizers: Iterable[Tapped], tap: Tap) -> Iterator[None]:
    """Sets the tap of all quantizers within the context. Taps do not nest: the inner one replaces the outer."""
    before = [(quantizer, quantizer.tap) for quantizer in quantizers]
    for quantizer, _ in before:
        quantizer.tap = tap
    try:
        yield
    finally:
        for quantizer, old in before:
            quantizer.tap = old
