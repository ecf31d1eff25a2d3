"""The quantizers of a module as AIMET shows them, on `custom`: `sim.model.conv1.param_quantizers["weight"]`.

A place without a quantizer holds None; None may be put there, and the quantizer that stood there put back. Biases
follow from other scales, so that they show none. What AIMET's objects have beyond this names `backend="aimet"`.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import Simulation
from pow2quant.config import TensorSpec
from pow2quant.errors import ConfigError
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from torch import fx


class Owner(Protocol):
    """The simulation that quantizers belong to; see `members.Members`."""

    simulation: Simulation
    frozen: frozenset[str]

    def encodings(self) -> Table: ...
    def spec(self, site: Site) -> TensorSpec: ...
    def planned(self, site: Site) -> TensorSpec | None: ...
    def is_quantized(self, site: Site) -> bool: ...
    def axis(self, site: Site) -> int | None: ...
    def change(self, site: Site, spec: TensorSpec | None) -> None: ...
    def take_range(self, site: Site, low: Any, high: Any) -> None: ...
    def freeze(self, names: Collection[str], fixed: bool) -> None: ...


SLOTS = ("param_quantizers", "input_quantizers", "output_quantizers")

ATTACHED = "pow2quant_attached"
"""Where a model's `meta` keeps which modules have them."""


class Quantizer:
    """One site's quantizer. Widths and symmetry hold from the next encodings on; a range that is there is kept."""

    def __init__(self, sim: Owner, site: Site) -> None:
        self._sim, self.site = weakref.ref(sim), site

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f'{self.site.name}: {name}: only quantizers of backend="aimet" have it')

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("_sim", "site", "bitwidth", "symmetric"):
            raise AttributeError(f'{self.site.name}: {name} cannot be set; only quantizers of backend="aimet" have it')
        super().__setattr__(name, value)

    def __call__(self, x: Tensor) -> Tensor:
        """The fake-quantized x. Raises ConfigError without an encoding."""
        if self._encoding is None:
            raise ConfigError(f"{self.site.name}: has no encoding yet")
        return torch.from_numpy(self._encoding.fake_quantize(x.detach().cpu().numpy())).to(x.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantizer) and (self.site, self.sim) == (other.site, other.sim)

    def __hash__(self) -> int:
        return hash(self.site)

    def __repr__(self) -> str:
        return f"Quantizer({self.site.name}, {self.bitwidth} bits, {self._encoding})"

    @property
    def sim(self) -> Owner:
        """The simulation that it belongs to. Raises ConfigError when that is gone."""
        found = self._sim()
        if found is None:
            raise ConfigError(f"{self.site.name}: its QuantizationSimModel is gone")
        return found

    @property
    def _spec(self) -> TensorSpec:
        return self.sim.spec(self.site)

    @property
    def _encoding(self) -> Encoding | None:
        return self.sim.encodings().get(self.site.name)

    @property
    def bitwidth(self) -> int:
        """Its width in bits."""
        return self._spec.bits

    @bitwidth.setter
    def bitwidth(self, bits: int) -> None:
        self.sim.change(self.site, replace(self._spec, bits=bits))

    @property
    def symmetric(self) -> bool:
        """Whether its grid is signed, with zero point 0."""
        return self._spec.symmetric

    @symmetric.setter
    def symmetric(self, symmetric: bool) -> None:
        self.sim.change(self.site, replace(self._spec, symmetric=symmetric))

    @property
    def signed(self) -> bool:
        """Whether codes are signed."""
        return self._spec.symmetric

    @property
    def _grid(self) -> IntGrid:
        return IntGrid(self._spec.bits, self._spec.symmetric)

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return int(self._grid.qmin)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return int(self._grid.qmax)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of scales and ranges: () or one per channel, as in the weight."""
        axis = self.sim.axis(self.site)
        channels = self.sim.simulation.parameter(self.site.name).shape if axis is not None else ()
        return tuple(n if d == axis else 1 for d, n in enumerate(channels))

    def is_initialized(self) -> bool:
        """Whether it has an encoding."""
        return self._encoding is not None

    def _tensor(self, values: Any, dtype: torch.dtype | None) -> Tensor:
        return torch.from_numpy(np.array(values, np.float32)).reshape(self.shape).to(dtype or torch.float32)

    def get_scale(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """(shape), powers of two; None without an encoding, as of the three below."""
        return None if self._encoding is None else self._tensor(self._encoding.scale, dtype)

    def get_offset(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The negative zero point."""
        return None if self._encoding is None else self._tensor(-self._encoding.zero_point, dtype)

    def get_min(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The smallest value that it represents."""
        return None if self._encoding is None else self._tensor(self._encoding.minimum, dtype)

    def get_max(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The largest value that it represents."""
        return None if self._encoding is None else self._tensor(self._encoding.maximum, dtype)

    min, max = property(get_min), property(get_max)

    def set_range(self, min: Any, max: Any) -> None:
        """Takes the smallest scale 2^k that covers the range."""
        self.sim.take_range(self.site, *(np.broadcast_to(np.asarray(v, np.float32), self.shape) for v in (min, max)))

    def allow_overwrite(self, allowed: bool) -> None:
        """Whether `compute_encodings` and `load_encodings` may change it."""
        self.sim.freeze([self.site.name], not allowed)

    def is_overwrite_allowed(self) -> bool:
        """See `allow_overwrite`."""
        return self.site.name not in self.sim.frozen

    def requires_grad_(self, requires_grad: bool = True) -> Quantizer:
        """Raises ConfigError for True: scales are trained by `pow2quant.qat`, or with `backend="aimet"`."""
        if requires_grad:
            raise ConfigError(f'{self.site.name}: requires_grad: only backend="aimet" trains encodings by itself')
        return self


class Slots:
    """A module's quantizers of one kind, by parameter name or number. Copies of a model have none of their own."""

    def __init__(self, sim: Owner, sites: Mapping[Any, Site | None], named: bool) -> None:
        self._sim, self._sites, self._named = weakref.ref(sim), dict(sites), named

    def __reduce__(self) -> tuple[Any, ...]:
        return Slots.gone, ()

    @staticmethod
    def gone() -> None:
        """What stands in a copied or pickled model."""
        return

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sites) if self._named else (self[key] for key in self._sites)

    def __contains__(self, key: object) -> bool:
        return key in self._sites if self._named else any(q is key or q == key for q in self)

    def __getitem__(self, key: Any) -> Quantizer | None:
        site = self._sites[key if self._named or key >= 0 else len(self) + key]
        sim = self._sim()
        return None if site is None or sim is None or not sim.is_quantized(site) else Quantizer(sim, site)

    def __setitem__(self, key: Any, value: Any) -> None:
        site, sim = self._sites[key], self._sim()
        if value == self[key] or sim is None:
            return
        if site is None or not (value is None or value == Quantizer(sim, site)):
            raise ConfigError(f'{site.name if site else key}: only None can be put here; use backend="aimet"')
        sim.change(site, None if value is None else sim.planned(site))

    def keys(self) -> Iterator[Any]:
        """The parameters' names."""
        return iter(self._sites)

    def values(self) -> Iterator[Quantizer | None]:
        """The quantizers."""
        return (self[key] for key in self._sites)

    def items(self) -> Iterator[tuple[Any, Quantizer | None]]:
        """Both."""
        return ((key, self[key]) for key in self._sites)


def attach(sim: Owner) -> None:
    """Gives the modules of `sim.model` their `param_quantizers`, `input_quantizers` and `output_quantizers`."""
    placement, network = sim.simulation.placement, sim.simulation.network
    layers = {layer.module: layer for layer in placement.layers}
    called = [node for node in network.graph.nodes if node.op == "call_module"]
    model: Any = sim.simulation.model
    model.meta[ATTACHED] = [str(node.target) for node in called]
    for node in called:
        name = str(node.target)
        layer = layers.get(name)
        weights = {} if layer is None else {"weight": layer.weight}
        if layer is not None and getattr(network.get_submodule(name), "bias", None) is not None:
            weights["bias"] = None
        module: Any = sim.simulation.model.get_submodule(name)
        module.param_quantizers = Slots(sim, weights, named=True)
        module.input_quantizers = Slots(sim, dict(enumerate(_inputs(node, placement.quantized))), named=False)
        module.output_quantizers = Slots(sim, {0: placement.quantized.get(node.name)}, named=False)


def _inputs(node: fx.Node, quantized: Mapping[str, Site]) -> list[Site | None]:
    """A network's input is quantized where it is read, as AIMET shows it; every other tensor where it is made."""
    sources: list[Any] = list(node.args)
    found = [quantized.get(s.name) if getattr(s, "op", "") == "placeholder" else None for s in sources]
    return found or [None]


def refuse_replaced(model: nn.Module) -> None:
    """Raises ConfigError for a module that was replaced, or whose quantizers' places were: nothing would change."""
    for name in getattr(model, "meta", {}).get(ATTACHED, ()):
        if SLOTS[0] not in vars(model.get_submodule(name)):
            raise ConfigError(
                f"{name} was replaced, and would compute in float; change the network before it is simulated"
            )
    for name, module in model.named_modules():
        places = [isinstance(vars(module).get(kind), Slots) for kind in SLOTS]
        if any(places) and not all(places):
            kind = SLOTS[places.index(False)]
            raise ConfigError(f'{name}.{kind} was replaced; set its items, or use backend="aimet"')


def owner_of(model: nn.Module) -> Owner | None:
    """The simulation whose model it is, on `custom`."""
    return next((module.param_quantizers._sim() for _, module in quantized_modules(model)), None)  # type: ignore[operator, union-attr]


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have quantizers' places, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(vars(module).get(SLOTS[0]), Slots))
