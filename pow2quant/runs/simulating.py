"""A quantized network in Python: calibrated, corrected by methods, called, exported and checked by hand."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant.artifact import Artifact, Site, Table
from pow2quant.backends.base import ALL, SILENT, Batch, Progress, Simulation, Tap, inputs
from pow2quant.backends.placement import Placement
from pow2quant.config import QuantPlan
from pow2quant.datasets.sources import data_of
from pow2quant.errors import ConfigError, DataError, EncodingError, ModelError, Pow2QuantError
from pow2quant.frontends.prepare import is_prepared, prepare
from pow2quant.reading import Checked, Signature
from pow2quant.runs.calling import described
from pow2quant.runs.chosen import method_of, shown
from pow2quant.runs.job import call, simulation_of


@dataclass(eq=False, repr=False)
class Simulated:
    """A `backends.base.Simulation`, and what people do with one.

    simulation: the backend's own. example: inputs of one call, (N, …). Data may have any form that
    `pow2quant.quantize` takes. It is called like the network, with float32 tensors, and computes what the files do.
    """

    simulation: Simulation
    example: Batch
    seen: Sequence[Batch] = field(default=(), init=False)

    @property
    def model(self) -> nn.Module:
        """The fake-quantizing network, under the user's submodule names; trainable."""
        return self.simulation.model

    @property
    def sites(self) -> Sequence[Site]:
        """Every tensor that is quantized, in order of computation."""
        return self.simulation.sites

    @property
    def network(self) -> fx.GraphModule:
        """The prepared float network that is simulated."""
        return self.simulation.network

    @property
    def placement(self) -> Placement:
        """Which node of `network` is quantized by which site."""
        return self.simulation.placement

    def __call__(self, *tensors: Tensor) -> Any:
        """The quantized network's results. Raises EncodingError for a network that is not calibrated yet."""
        if not self.encodings():
            raise EncodingError("the network has no encodings yet: calibrate(data) first")
        return self.model(*tensors)

    def parameter(self, name: str) -> Tensor:
        """The float parameter of the model with this name in the prepared network."""
        return self.simulation.parameter(name)

    def encodings(self) -> Table:
        """The encodings by site name; sites that have none yet are absent."""
        return self.simulation.encodings()

    def load(self, table: Table) -> None:
        """Takes over encodings; see `backends.base.Simulation.load`."""
        self.simulation.load(table)

    def intercept(self, tap: Tap) -> AbstractContextManager[None]:
        """Within the context every site's value is what `tap(site, x, fake_quantized_x)` returns."""
        return self.simulation.intercept(tap)

    def calibrate(self, data: Any, roles: Collection[str] = ALL) -> Table:
        """Chooses encodings on data, a DataLoader for instance, whose targets are left aside. Returns all encodings.

        Raises DataError for data that cannot be used, ModelError where the network fails on them, EncodingError when a
        bias cannot be represented.
        """
        if not set(roles) & {"input", "output"}:
            return self.simulation.calibrate((), roles)
        self.seen = list(self._batches(data))
        try:
            return self.simulation.calibrate(self.seen, roles)
        except Pow2QuantError:
            raise
        except Exception as error:
            what = described(self.seen[0]) if self.seen else "no data"
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"the network fails on calibration data of {what}: {reason}") from error

    def apply(self, method: Any, data: Any = None, progress: bool | Progress = SILENT) -> Simulated:
        """Applies a method: its name (`adaround`, `gpfq:conv_scalar=1.16`), `{name: {key: value}}`, or an object.

        data: default: those of the last `calibrate`. Returns itself. Raises ConfigError for what is no method, or
        rewrites the float network.
        """
        made = method_of(method)
        if not hasattr(made, "apply"):
            raise ConfigError(
                f"methods: {method!r} changes the float network or chooses among methods, before anything is "
                "simulated; give it to quantize(model, data, methods=[...])"
            )
        batches = self.seen if data is None else list(self._batches(data))
        if not batches:
            raise DataError("data: needed; calibrate(data) first, or apply(method, data)")
        with torch.enable_grad():  # some methods learn
            call(made.apply, self.simulation, batches, progress=shown(progress))
        return self

    def export(self, to: Batch | str | os.PathLike[str] | None = None) -> Artifact:
        """The quantized network for every exporter; with a folder, its QDQ file is written there as `model.onnx`.

        to: a folder, or inputs of one call to export with; default: the example.
        """
        folder = to if isinstance(to, (str, os.PathLike)) else None
        artifact = self.simulation.export(self.example if to is None or folder is not None else to)  # type: ignore[arg-type]
        if folder is not None:
            artifact.save(folder)
        return artifact

    def _batches(self, data: Any) -> Iterator[Batch]:
        """The inputs of data in any form, batch by batch."""
        known = isinstance(data, Iterator) or (isinstance(data, Iterable) and _are_inputs(data))
        parts = data if known else data_of(data, "data", 64, 64).calibration
        parts = parts.batches if isinstance(parts, Checked) else parts
        dimensions = [x.ndim for x in inputs(self.example)]
        for index, (batch, _) in enumerate(Checked(parts, "calibration data", Signature.of(self.network))):
            if [x.ndim for x in inputs(batch)] != dimensions:
                seen = described(self.example)
                raise DataError(f"calibration data, batch {index}: is {described(batch)}, the example was {seen}")
            yield batch

    def __repr__(self) -> str:
        done = len(self.encodings())
        state = f"{done} encodings" if done else "not calibrated: calibrate(data)"
        return f"Simulated({len(self.sites)} quantized tensors, {state})"


def _are_inputs(data: Iterable[Any]) -> bool:
    """Whether these are batches of inputs in a row already."""
    return isinstance(data, (list, tuple)) and all(x.ndim > 1 for part in data for x in inputs(part))


def simulate(
    network: nn.Module,
    example: Batch | None = None,
    plan: QuantPlan | None = None,
    backend: str = "custom",
    **widths: Any,
) -> Simulated:
    """A quantized simulation of a network: prepared, batch norm folded, wrapped by the backend; not yet calibrated.

    network: any traceable module (left unchanged), or what `prepare` returned. example: inputs of one call, (N, …).
    widths: `weight_bits`, `activation_bits`, `per_tensor`, as of `QuantPlan`, where no plan is given.
    """
    if not _is_example(example):
        raise ConfigError("example: needed, inputs of one call such as torch.rand(1, 3, 224, 224)")
    if plan is not None and widths:
        raise ConfigError(f"plan: says the widths already; leave out {', '.join(widths)}")
    assert example is not None
    prepared = network if isinstance(network, fx.GraphModule) and is_prepared(network) else prepare(network, example)
    return Simulated(simulation_of(prepared, example, plan or QuantPlan(**widths), backend), example)


def _is_example(example: Any) -> bool:
    return isinstance(example, Tensor) or (isinstance(example, (tuple, list, dict)) and bool(inputs(example)))
