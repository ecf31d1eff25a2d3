"""The `aimet` backend: Qualcomm's `QuantizationSimModel`, with every scale exactly 2^k (needs `pow2quant[aimet]`).

AIMET wraps the network that `prepare` made; where quantizers stand and which k they take is decided by the same code as
in every backend. AIMET's modules call the quantizers, and AIMET's arithmetic quantizes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from pow2quant.artifact import Artifact, Site, Table
from pow2quant.backends.aimet.modules import load_aimet, quiet, readers_of_inputs
from pow2quant.backends.aimet.quantizers import WIDEST, site_quantizers
from pow2quant.backends.base import ALL, Batch, Tap, device_of, inputs, tapping
from pow2quant.backends.calibration import calibrate
from pow2quant.backends.export import to_artifact
from pow2quant.backends.placement import Placement, connect, place
from pow2quant.config import QuantPlan
from pow2quant.errors import ConfigError, EncodingError, UnsupportedModelError
from pow2quant.frontends.copies import copied
from pow2quant.pow2_constraints import IntGrid
from pow2quant.pow2_constraints.encoding import block_shape


class AimetSimulation:
    """Qualcomm's AIMET QuantSim, constrained to 2^k (see `backends.base.Simulation` for every member).

    network: prepared, batch norm folded; not changed. example: one batch. plan: what is quantized and how.
    quantsim: AIMET's `QuantizationSimModel`; `model` is its model. The ranges of its quantizers are trainable
    parameters, as they are in AIMET, those of biases excepted; whatever sets or trains them, scales stay powers of two.
    Raises MissingExtraError without AIMET, ConfigError for a width that it cannot simulate.
    """

    def __init__(self, network: fx.GraphModule, example: Batch, plan: QuantPlan) -> None:
        self.placement: Placement = place(network, plan)
        self.sites: Sequence[Site] = self.placement.sites
        if self.placement.roundings:
            name, rule = next(iter(self.placement.roundings.items()))
            raise ConfigError(
                f"{name}: target {plan.target.name} rounds {rule}; the aimet backend rounds half_even only"
            )
        for site in self.sites:
            bits = self.placement.specs[site.name].bits
            if bits > WIDEST and site.role != "bias":
                raise ConfigError(f"{site.name}: the aimet backend simulates 2 to {WIDEST} bits, not {bits}")
        self.network = network
        model = copied(network)
        readers = readers_of_inputs(model)
        self.quantsim: Any = _wrapped(model, example)
        self.model: nn.Module = self.quantsim.model
        self._quantizers: dict[str, Any] = {}
        self._slots: dict[str, tuple[Any, str, str | int]] = {}
        for site in self.sites:
            self._place(site, readers)
        connect(self.model, network, self.placement, self._quantizers)

    def _place(self, site: Site, readers: dict[str, tuple[str, int]]) -> None:
        """Makes the quantizer of a site, and puts it where AIMET looks for it."""
        free, constrained = site_quantizers()
        spec = self.placement.specs[site.name]
        layer = next((y for y in self.placement.layers if y.weight == site), None)
        axis, block = (0 if site.role == "bias" else None, None) if layer is None else (layer.axis, layer.block)
        sizes = self.parameter(site.name).shape if axis is not None else ()
        shape = tuple(n if d == axis else 1 for d, n in enumerate(sizes))
        if axis is not None and block is not None:
            shape = block_shape(sizes, axis, block)
        holder, key = readers.get(site.name, (site.module, 0))
        module: Any = self.model.get_submodule(holder)
        cls = constrained if spec.power_of_2 and site.role != "bias" else free
        quantizer = self._quantizers[site.name] = cls(site, spec, shape, axis, block).to(device_of(self.network))
        parameter = site.role in ("weight", "bias")
        kind = "param" if parameter else site.role
        self._slots[site.name] = (module, f"{kind}_quantizers", site.role if parameter else key)
        self._slot(site.name)[self._slots[site.name][2]] = quantizer

    def _slot(self, name: str) -> Any:
        """AIMET's list or dictionary that holds the quantizer of a site; its tools may replace it."""
        module, attribute, _ = self._slots[name]
        return getattr(module, attribute)

    def constrain(self) -> None:
        """Puts our quantizers back where AIMET's mixed precision stands in for them or left plain ones.

        Ours take over width and range, with the smallest power of two that covers it; the width is then what
        calibration goes by, as it is wherever one of AIMET's tools has set it. Every method that speaks of encodings
        does this first; until then, `model` may compute with free scales. A quantizer that AIMET removed, for a while
        or for good, is not put back. Raises ConfigError for what cannot be taken over: floating point numbers, blocks,
        other shapes, asymmetric weights, quantizers where the network has no site.
        """
        self._refuse_strangers()
        for name, quantizer in self._quantizers.items():
            slot, key = self._slot(name), self._slots[name][2]
            found = slot[key]
            kind = getattr(found, "data_type", None)
            if found is not None and (getattr(kind, "name", "int") != "int" or not hasattr(found, "qmin")):
                raise ConfigError(f"{name}: AIMET chose floating point numbers; only integer grids have a scale of 2^k")
            if getattr(found, "block_size", None) or getattr(found, "shape", quantizer.shape) != quantizer.shape:
                raise ConfigError(f'{name}: a quantizer of another shape is not possible here; use placement="aimet"')
            if found is not None and found is not quantizer:
                slot[key] = quantizer
                vars(quantizer).pop("_cached_v2_quantizer", None)  # the plain one, among attributes that they share
                quantizer.qmin, quantizer.qmax, quantizer.symmetric = found.qmin, found.qmax, found.symmetric
                if quantizer.encoded and quantizer.site.role != "bias":
                    quantizer.set_range(found.min.detach(), found.max.detach())
            self._take_symmetry(name, quantizer)
            width = (quantizer.qmax - quantizer.qmin).bit_length()
            if width == quantizer.bits:
                continue
            if quantizer.site.role == "bias":  # mixed precision takes it for a weight
                grid = IntGrid(quantizer.bits, signed=True)
                quantizer.qmin, quantizer.qmax = int(grid.qmin), int(grid.qmax)
            else:
                quantizer.bits = width
                self.placement.specs[name] = replace(self.placement.specs[name], bits=width)

    def _refuse_strangers(self) -> None:
        """Raises ConfigError for a quantizer that was put where the network has no site: it would never be exported."""
        slots = {(id(self._slot(name)), key) for name, (_, _, key) in self._slots.items()}
        for path, module in self.quantsim.named_qmodules():
            for kind in ("param", "input", "output"):
                holder = getattr(module, f"{kind}_quantizers")
                items = holder.items() if isinstance(holder, nn.ModuleDict) else enumerate(holder)
                for key, found in items:
                    stands_in = not getattr(found, "enabled", True)  # mixed precision's, where there was none
                    if found is not None and not stands_in and (id(holder), key) not in slots:
                        where = f"{path}.{kind}_quantizers[{key!r}]"
                        raise ConfigError(f'{where}: no tensor is quantized here; use placement="aimet"')

    def _take_symmetry(self, name: str, quantizer: Any) -> None:
        """Takes over a `symmetric` that somebody has set. Raises ConfigError for asymmetric weights."""
        if quantizer.symmetric == quantizer.known_symmetric or quantizer.site.role == "bias":
            return
        if quantizer.site.role == "weight":
            raise ConfigError(f'{name}: weights are quantized symmetrically; placement="aimet" knows other ones')
        quantizer.known_symmetric = quantizer.symmetric
        self.placement.specs[name] = replace(self.placement.specs[name], symmetric=quantizer.symmetric)

    @property
    def frozen(self) -> frozenset[str]:
        """The weights and activations whose encodings AIMET's tools, such as SeqMSE, have fixed, by site name."""
        self.constrain()
        sites = {s.name: s for s in self.sites if s.role != "bias"}
        return frozenset(name for name in sites if not self._quantizers[name].is_overwrite_allowed())

    def parameter(self, name: str) -> Tensor:
        """The float weight or bias of a module, by `<module>.weight` or `<module>.bias`."""
        return self.model.get_parameter(name)

    def calibrate(self, batches: Iterable[Batch], roles: Collection[str] = ALL) -> Table:
        """See `Simulation.calibrate`. Raises ConfigError, too, for a site whose quantizer somebody has removed."""
        present = set(self.model.modules())
        for name, (module, _, key) in self._slots.items():
            if module not in present or self._slot(name)[key] is None:
                raise ConfigError(
                    f'{name}: its quantizer was removed; name it in the overrides instead, or use placement="aimet"'
                )
        return calibrate(self, batches, roles)

    def encodings(self) -> Table:
        """See `Simulation.encodings`; read from AIMET's quantizers, so that trained ranges count."""
        self.constrain()
        found = {name: q.encoding for name, q in self._quantizers.items()}
        return {name: encoding for name, encoding in found.items() if encoding is not None}

    def load(self, table: Table) -> None:
        """See `Simulation.load`; sites that the table leaves out have no encoding afterwards.

        Raises EncodingError, too, for an encoding that AIMET would not represent to the last bit, such as a free scale
        at a site whose scales are powers of two (NotPowerOfTwoError); then the encodings are what they were.
        """
        foreign = sorted(set(table) - set(self._quantizers))
        if foreign:
            unknown = f"{len(foreign)} of {len(table)} are unknown"
            raise EncodingError(f"{foreign[0]}: the network has no such site ({unknown})")
        before = self.encodings()
        try:
            for name, quantizer in self._quantizers.items():
                quantizer.encoding = table.get(name)
        except EncodingError:
            for name, quantizer in self._quantizers.items():
                quantizer.encoding = before.get(name)
            raise

    @contextmanager
    def intercept(self, tap: Tap) -> Iterator[None]:
        """See `Simulation.intercept`. Taps do not nest: the inner one replaces the outer."""
        self.constrain()
        with tapping(self._quantizers.values(), tap):
            yield

    def export(self, example: Batch) -> Artifact:
        """See `Simulation.export`. Raises EncodingError, too, for a site whose quantizer AIMET has removed."""
        self.constrain()
        for name, (_, _, key) in self._slots.items():
            if self._slot(name)[key] is None:
                raise EncodingError(f"{name}: AIMET has removed its quantizer; only simulated encodings are exported")
        return to_artifact(self.network, self.placement, self.encodings(), self.parameter)


def _wrapped(model: fx.GraphModule, example: Batch) -> Any:
    """AIMET's QuantizationSimModel around `model`, without a quantizer yet."""
    aimet = load_aimet()
    with quiet():
        try:
            sim = aimet.QuantizationSimModel(
                model, tuple(x[:1].to(device_of(model)) for x in inputs(example)), in_place=True
            )
        except RuntimeError as error:
            raise UnsupportedModelError(f"AIMET cannot wrap the network: {str(error).splitlines()[0]}") from error
    for module in sim.qmodules():
        for quantizers in (module.input_quantizers, module.output_quantizers, module.param_quantizers):
            for key in list(quantizers) if isinstance(quantizers, nn.ModuleDict) else range(len(quantizers)):
                quantizers[key] = None
    return sim
