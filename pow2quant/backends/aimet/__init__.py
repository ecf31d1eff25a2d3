"""The `aimet` backend: Qualcomm's `QuantizationSimModel`, with every scale exactly 2^k (needs `pow2quant[aimet]`).

AIMET wraps the network that `prepare` made; where quantizers stand and which k they take is decided by the same code as
in every backend. AIMET's modules call the quantizers, and AIMET's arithmetic quantizes.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pow2quant.artifact import Artifact, Site, Table
from pow2quant.backends.base import ALL, Batch, Tap, inputs, tapping
from pow2quant.backends.calibration import calibrate
from pow2quant.backends.export import to_artifact
from pow2quant.backends.placement import Placement, connect, place
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import ConfigError, DataError, EncodingError, MissingExtraError, UnsupportedModelError
from pow2quant.frontends import modules as m
from pow2quant.frontends.operators import OPERATORS
from pow2quant.pow2_constraints import Encoding, Format, IntGrid, Observed, choose, exact_exponent

ONNX_TYPES: dict[type, str] = {
    m.Permute: "Transpose",
    m.Mean: "ReduceMean",
    m.NearestUpsample: "Resize",
    m.ZeroPad: "Pad",
}
"""How AIMET's configuration files and tools call our modules, where that is not the class's name."""

WIDEST = 16
"""Bits of weights and activations; biases have up to 32."""


def __getattr__(name: str) -> Any:
    """Classes that derive from AIMET's exist once AIMET is imported; `pickle` finds them here."""
    if name.startswith("Quantized") or name in ("SiteQuantizer", "PowerOfTwoQuantizer"):
        for cls in (*_quantizers(), *_modules()):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Entry(nn.Module):
    """Passes an input of the network on, where several modules read it: its one reader, for AIMET."""

    def forward(self, x: Tensor) -> Tensor:
        return x


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
        model = copy.deepcopy(network)
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
        free, constrained = _quantizers()
        spec = self.placement.specs[site.name]
        axis = next((y.axis for y in self.placement.layers if y.weight == site), 0 if site.role == "bias" else None)
        channels = self.parameter(site.name).shape if axis is not None else ()
        shape = tuple(n if d == axis else 1 for d, n in enumerate(channels))
        holder, key = readers.get(site.name, (site.module, 0))
        module: Any = self.model.get_submodule(holder)
        cls = constrained if spec.power_of_2 and site.role != "bias" else free
        quantizer = self._quantizers[site.name] = cls(site, spec, shape, axis).to(device_of(self.network))
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
                raise ConfigError(f'{name}: no quantizer of another shape can stand here; use placement="aimet"')
            if found is not None and found is not quantizer:
                slot[key] = quantizer
                vars(quantizer).pop(
                    "_cached_v2_quantizer", None
                )  # the plain one, kept among attributes that they share
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
        """See `Simulation.calibrate`."""
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


@contextmanager
def quiet() -> Iterator[None]:
    """AIMET's log lines and the warnings that it causes are dropped, unless the logger `pow2quant` is at DEBUG."""
    if logging.getLogger("pow2quant").isEnabledFor(logging.DEBUG):
        yield
        return
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@cache
def load_aimet() -> Any:
    """The module `aimet_torch`, which knows our modules from then on. Raises MissingExtraError."""
    with quiet():
        try:
            import aimet_torch
            from aimet_torch.nn import QuantizationMixin
        except ModuleNotFoundError as error:
            raise MissingExtraError("the aimet backend needs aimet-torch: pip install 'pow2quant[aimet]'") from error
    from aimet_torch.onnx_utils import map_torch_types_to_onnx

    for cls in (*OPERATORS, Entry):
        if cls not in QuantizationMixin.cls_to_qcls:
            map_torch_types_to_onnx.setdefault(cls, [ONNX_TYPES.get(cls, cls.__name__)])
            QuantizationMixin.implements(cls)(_quantized(cls, QuantizationMixin))
    return aimet_torch


def _modules() -> list[type]:
    """What stands for our modules in AIMET."""
    known = load_aimet().nn.QuantizationMixin.cls_to_qcls
    return [known[cls] for cls in (*OPERATORS, Entry) if known[cls].__module__ == __name__]


def _quantized(cls: type[nn.Module], mixin: type) -> type:
    """The class that AIMET puts in the place of one of ours: the same computation between its quantizers."""

    def forward(self: Any, *tensors: Tensor) -> Tensor:
        pairs = zip_longest(tensors, self.input_quantizers[: len(tensors)])
        with self._patch_quantized_parameters():
            result = cls.forward(self, *(x if q is None else q(x) for x, q in pairs))
        (quantizer,) = self.output_quantizers
        quantized: Tensor = result if quantizer is None else quantizer(result)
        return quantized

    def __quant_init__(self: Any) -> None:
        mixin.__quant_init__(self)  # type: ignore[attr-defined]
        code = cls.forward.__code__
        count = code.co_argcount - 1 + bool(code.co_flags & 4)  # `*tensors` begins with one
        self.input_quantizers = nn.ModuleList([None] * count)  # type: ignore[list-item]

    members = {
        "__module__": __name__,
        "forward": forward,
        "__quant_init__": __quant_init__,
        "_supports_dynamic_input_count": classmethod(lambda _: bool(cls.forward.__code__.co_flags & 4)),
    }
    return type(f"Quantized{cls.__name__}", (mixin, cls), members)


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


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def readers_of_inputs(model: fx.GraphModule) -> dict[str, tuple[str, int]]:
    """For every input of the network the module that reads it, and as which of its inputs.

    AIMET quantizes an input where it is read. One that is read more than once gets an `Entry` in front.
    """
    readers = {}
    for node in [n for n in model.graph.nodes if n.op == "placeholder"]:
        uses = [(user, i) for user in node.users for i, a in enumerate(user.args) if a is node]
        if len(uses) != 1 or uses[0][0].op != "call_module":
            model.add_submodule(f"{node.name}_entry", Entry())
            with model.graph.inserting_after(node):
                entry = model.graph.call_module(f"{node.name}_entry")
            node.replace_all_uses_with(entry)
            entry.args = (node,)
            uses = [(entry, 0)]
        readers[str(node.target)] = (str(uses[0][0].target), uses[0][1])
    model.recompile()
    return readers


@cache
def _quantizers() -> tuple[type, type]:
    """`SiteQuantizer` and `PowerOfTwoQuantizer`, AIMET's quantizer with one and with two changes."""
    load_aimet()
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.quantization.affine.backends.torch_builtins import QuantDequantFunc
    from aimet_torch.utils import ste_round

    class SiteQuantizer(QuantizeDequantize):  # type: ignore[misc]
        """The quantizer of one site, with a scale of its own. Without an encoding, values pass unchanged.

        Parametrized with scale and offset: a free scale cannot be had back from a range to the last bit.
        """

        def __init__(self, site: Site, spec: TensorSpec, shape: Sequence[int], axis: int | None) -> None:
            grid = IntGrid(spec.bits, spec.symmetric)
            super().__init__(tuple(shape), int(grid.qmin), int(grid.qmax), symmetric=spec.symmetric)
            self.site, self.axis, self.tap = site, axis, None
            self.bits, self.known_symmetric = spec.bits, spec.symmetric
            self._parametrize()
            self._forget()
            if site.role == "bias":  # its scale follows from two others'
                self.requires_grad_(False)
                self.allow_overwrite(False)

        def _parametrize(self) -> None:
            self._reparametrize_to_scale_offset()

        def _forget(self) -> None:
            for name, parameter in list(self._parameters.items()):
                self.register_quantization_parameter(name, parameter)

        def forward(self, input: Tensor) -> Tensor:
            if torch._C._get_tracing_state() or torch.onnx.is_in_onnx_export():
                return super().forward(input) if self.encoded else input
            enabled = vars(self).get("enabled", True)  # mixed precision switches it off meanwhile
            encoding = self.get_encodings() if enabled else None
            quantized = input
            if encoding is not None:
                # AIMET's arithmetic, without its shortcut to torch's fake_quantize, which multiplies by 1/scale
                quantized = QuantDequantFunc.apply(
                    input, encoding.scale, encoding.offset, self.qmin, self.qmax, self.zero_point_shift
                )
            return quantized if self.tap is None else self.tap(self.site, input, quantized)

        @property
        def encoded(self) -> bool:
            """Whether there is an encoding."""
            return bool(super().is_initialized())

        def is_initialized(self) -> bool:
            """Always: AIMET would choose an encoding for a parameter that has none, by itself and without a word."""
            return True

        def get_encodings(self) -> Any:
            return super().get_encodings() if self.encoded else None

        def get_scale(self, dtype: torch.dtype | None = None) -> Tensor | None:
            """AIMET's, without its lower bound of 2^-23."""
            return self.scale.abs().to(dtype or torch.float32) if self.encoded else None

        def get_min(self, dtype: torch.dtype | None = None) -> Tensor | None:
            return super().get_min(dtype) if self.encoded else None

        def get_max(self, dtype: torch.dtype | None = None) -> Tensor | None:
            return super().get_max(dtype) if self.encoded else None

        def _get_offset(self, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor | None:
            return super()._get_offset(scale, dtype) if self.encoded else None

        _allow_overwrite = property(lambda self: self.is_overwrite_allowed())  # AIMET's warns at every call

        @property
        def encoding(self) -> Encoding | None:
            """What AIMET computes with, to the last bit."""
            if not self.encoded:
                return None
            with torch.no_grad():
                now = self.get_encodings()
            shape = () if self.axis is None else (-1,)
            scale, offset = (t.expand(self.shape).cpu().numpy().reshape(shape) for t in (now.scale, now.offset))
            bits = (self.qmax - self.qmin).bit_length()
            grid = IntGrid(bits, signed=self.qmin < 0, narrow=self.qmin == -self.qmax)
            return Encoding(scale, -offset.astype(np.int64), grid, self.axis)

        @encoding.setter
        def encoding(self, encoding: Encoding | None) -> None:
            if encoding is None:
                self._forget()
                return
            name, bits = self.site.name, encoding.grid.bits
            if isinstance(bits, tuple) or (bits > WIDEST and self.site.role != "bias"):
                raise EncodingError(f"{name}: the aimet backend simulates one width of 2 to {WIDEST} bits, not {bits}")
            if (encoding.axis is None) != (self.axis is None) or encoding.scale.size != np.prod(self.shape):
                has = f"{encoding.scale.size} scales (axis {encoding.axis})"
                raise EncodingError(f"{name}: {has} for a quantizer of shape {self.shape}")
            self.axis, self.qmin, self.qmax = encoding.axis, int(encoding.grid.qmin), int(encoding.grid.qmax)
            self.symmetric = self.known_symmetric = encoding.symmetric
            self.bits = bits
            self._take(encoding)
            if self.encoding != encoding:
                raise EncodingError(f"{name}: AIMET would not compute with exactly this encoding: {encoding!r}")

        def _take(self, encoding: Encoding) -> None:
            with torch.no_grad():
                self.scale.copy_(torch.from_numpy(encoding.scale.copy()).view(self.shape))
                if self.offset is not None:
                    self.offset.copy_(-torch.from_numpy(encoding.zero_point.copy()).view(self.shape))

        def extra_repr(self) -> str:
            return f"{self.site.name}, {super().extra_repr()}"

    class PowerOfTwoQuantizer(SiteQuantizer):
        """Its scale is the power of two nearest to what the range [min, max] asks for, wherever the range comes from.

        The gradient is that of the unrounded scale. even: zero points are even, unless an odd one was loaded.
        """

        even = True

        def _parametrize(self) -> None:
            self._reparametrize_to_min_max()

        def get_scale(self, dtype: torch.dtype | None = None) -> Tensor | None:
            if not self.encoded:
                return None
            return constrained_scale(self).to(dtype or torch.float32)

        def _get_offset(self, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor | None:
            offset = super()._get_offset(scale, dtype)
            if offset is None or self.symmetric or not self.even:
                return offset
            return torch.clamp(2 * ste_round(offset / 2), min=1 - self.qmax)

        def set_range(self, min: Any, max: Any) -> None:
            """Takes the smallest scale that covers the range: this is where AIMET's own calibration and loading end."""
            if min is None or max is None:
                super().set_range(min, max)
                return
            self._take(covering(self, min, max, self.site.name, self.axis))

        def _take(self, encoding: Encoding) -> None:
            exact_exponent(encoding.scale, self.site.name)
            self.even = not (encoding.zero_point % 2).any()
            ends = (encoding.minimum, encoding.maximum)
            super().set_range(*(torch.from_numpy(np.asarray(v, np.float32)).view(self.shape) for v in ends))

    for cls in (SiteQuantizer, PowerOfTwoQuantizer):
        cls.__qualname__ = cls.__name__  # found here again by `pickle`, through __getattr__
    return SiteQuantizer, PowerOfTwoQuantizer


def constrained_scale(quantizer: Any) -> Tensor:
    """The power of two nearest to what a quantizer's `min` and `max` ask for; its gradient is the unrounded scale's."""
    raw: Tensor = ((quantizer.max - quantizer.min) / (quantizer.qmax - quantizer.qmin)).abs().float()
    return nearest_power_of_two(raw.detach()) + (raw - raw.detach())


def covering(quantizer: Any, low: Any, high: Any, name: str, axis: int | None) -> Encoding:
    """The encoding of smallest scale 2^k that covers [low, high], on the grid of a quantizer of AIMET's.

    axis: None for one scale, else there is one for each element of `quantizer.shape`. Raises DataError for NaN.
    """
    ends = (torch.as_tensor(v, dtype=torch.float32).detach().cpu().expand(quantizer.shape) for v in (low, high))
    least, most = (v.flatten().numpy() for v in ends)
    if not (np.isfinite(least).all() and np.isfinite(most).all()):
        raise DataError(f"{name}: NaN or infinity in the calibration data")
    form = Format((quantizer.qmax - quantizer.qmin).bit_length(), quantizer.symmetric, True, axis)
    return choose("minmax", Observed(least, most, np.stack([least, most], 1)), form)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """The 2^k nearest to positive float32 values on the logarithmic scale, exactly (and at least 2^-100).

    The bits of a float32 are its exponent over its fraction: adding 1 less 0x3504F4, the fraction of the first float32
    above sqrt(2), carries into the exponent from there on.
    """
    bits = x.clamp_min(2.0**-100).view(torch.int32)
    return ((bits + (0x800000 - 0x3504F4)) & -0x800000).view(torch.float32)
