"""AIMET's own simulation, at AIMET's own places, with every scale a power of two; and AIMET's tools that make one."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pow2quant.backends.aimet.modules import load_aimet, quiet, readers_of_inputs
from pow2quant.backends.aimet.quantizers import WIDEST, constrained_scale, covering, take_parity, with_parity
from pow2quant.backends.base import Batch, device_of, inputs
from pow2quant.backends.placement import place
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import ConfigError
from pow2quant.frontends.copies import copied


def __getattr__(name: str) -> Any:
    """The classes that derive from AIMET's exist once AIMET is imported; `pickle` finds them here."""
    if name == "ConstrainedQuantizer":
        return quantizer_class()
    if name == "ConstrainedSimModel":
        return tools()["QuantizationSimModel"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def quantizer_class() -> type:
    """AIMET's `QuantizeDequantize` with one change: its scale is the power of two nearest to what its range asks for.

    Whatever sets a range (calibration, a file, a tool), the smallest scale that covers it is taken; zero points are
    even. Like AIMET's it cannot run before it has an encoding.
    """
    load_aimet()
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.utils import ste_round

    class ConstrainedQuantizer(QuantizeDequantize):  # type: ignore[misc]
        """See `quantizer_class`. place: how errors call it."""

        place: str
        even = True

        def get_scale(self, dtype: torch.dtype | None = None) -> Tensor | None:
            return constrained_scale(self).to(dtype or torch.float32) if self.is_initialized() else None

        def _get_offset(self, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor | None:
            offset: Tensor | None = super()._get_offset(scale, dtype)
            if offset is None or self.symmetric or not self.even:
                return offset
            even = 2 * ste_round((offset + self.qmin) / 2) - self.qmin
            return torch.clamp(even, min=1 - self.qmax)

        def set_range(self, min: Any, max: Any) -> None:
            """Takes the smallest scale that covers the range. Raises DataError for NaN and infinity."""
            if min is not None and max is not None:
                found = covering(self, min, max, self.place, 0 if self.shape else None)
                ends = (found.minimum, found.maximum)
                min, max = (torch.from_numpy(np.asarray(v, np.float32)).view(self.shape) for v in ends)
            self.even = True
            super().set_range(min, max)

        def set_legacy_encodings(self, encodings: list[dict[str, Any]]) -> None:
            """Takes a file's encodings, and warns where a scale is none of 2^k."""
            super().set_legacy_encodings(encodings)
            scales = np.asarray([e.get("scale", 1) for e in encodings], np.float32)
            free = scales[np.frexp(scales)[0] != 0.5]
            if not free.size:
                self._take_odd([int(e.get("offset", 0)) for e in encodings], scales)
            if free.size:
                scale = f"{self.place}: scale {float(free[0])!r}"
                warnings.warn(f"{scale} is not a power of two; the smallest that covers is taken", stacklevel=2)

        def _take_odd(self, offsets: list[int], scales: Any) -> None:
            """Takes zero points as a file has them, where some are odd: their grid need not be chosen again."""
            if self.symmetric or self.qmin or not any(offset % 2 for offset in offsets):
                return
            low = scales * np.asarray(offsets, np.float32)
            ends = low, low + scales * np.float32(self.qmax)
            super().set_range(*(torch.from_numpy(v).view(self.shape) for v in ends))
            self.even = False

        def get_extra_state(self) -> Any:
            return with_parity(self, super().get_extra_state())

        def set_extra_state(self, state: Any) -> None:
            super().set_extra_state(take_parity(self, state))

    ConstrainedQuantizer.__qualname__ = ConstrainedQuantizer.__name__
    return ConstrainedQuantizer


@cache
def _constrained(kind: Any) -> type | None:
    """The constrained class for a class of quantizers; None where there is none.

    There is one for what stands in for AIMET's `QuantizeDequantize` while its mixed precision searches, too.
    """
    from aimet_torch.quantization.affine import QuantizeDequantize

    if kind is QuantizeDequantize:
        return quantizer_class()
    *mixed_in, plain = kind.__bases__
    if not mixed_in or plain is not QuantizeDequantize:
        return None
    return type(kind.__name__, (*mixed_in, quantizer_class()), {})


def constrain(quantsim: Any) -> None:
    """Makes every scale of any AIMET `QuantizationSimModel` a power of two: its quantizers stay where AIMET put them.

    Call it before AIMET's `compute_encodings`, and again after its mixed precision. Float quantizers stay as they are.
    Raises ConfigError for grids that this constraint does not know: narrow ones (-127 … 127), more than 16 bits, and
    blocks whose scales are multiples of a common one (LPBQ).
    """
    from aimet_torch.quantization.affine.quantizer import AffineQuantizerBase

    for path, quantizer in quantsim.named_quantizers():
        if isinstance(quantizer, quantizer_class()) or not isinstance(quantizer, AffineQuantizerBase):
            continue
        if not getattr(quantizer, "enabled", True):  # mixed precision's stand-in where there is none
            continue
        module, kind, key = path.rsplit(".", 2)
        role = key if kind == "param_quantizers" else kind.removesuffix("_quantizers")
        name = f"{module}.{role}" + ("" if key in (role, "0") else f".{key}")
        if hasattr(quantizer, "site"):  # of a simulation that is constrained already
            continue
        constrained = _constrained(type(quantizer))  # type: ignore[arg-type]
        if constrained is None:
            raise ConfigError(f"{name}: the scales of a {type(quantizer).__name__} cannot all be powers of two")
        codes = quantizer.qmax - quantizer.qmin + 1
        if codes & (codes - 1) or codes > 1 << WIDEST:
            ends = f"{quantizer.qmin} … {quantizer.qmax}"
            raise ConfigError(f"{name}: the grid {ends} does not have all codes of 2 to {WIDEST} bits")
        initialized = quantizer.is_initialized()
        quantizer.__class__ = constrained
        quantizer.place = name
        if initialized:
            quantizer.set_range(quantizer.min.detach(), quantizer.max.detach())


class _Constraining:
    """Constrains a simulation in front of every call of its model. In a copy of the model it does nothing.

    rests: while AIMET exports, when biases have quantizers too.
    """

    rests = False

    def __init__(self, quantsim: Any = None) -> None:
        self._quantsim = (lambda: None) if quantsim is None else weakref.ref(quantsim)

    def __call__(self, *_: Any) -> None:
        if (quantsim := self._quantsim()) is not None and not _Constraining.rests:
            constrain(quantsim)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Constraining, ()


@dataclass(frozen=True)
class _OnnxExporter:
    """AIMET's `sim.onnx`, which writes no bias whose scale would be free."""

    theirs: Any

    def export(self, *args: Any, **kwargs: Any) -> None:
        """AIMET's."""
        with _derived_biases():
            self.theirs.export(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.theirs, name)


@contextmanager
def _derived_biases() -> Iterator[None]:
    """Within it, AIMET quantizes biases by s_in * s_w only. Where it knows no s_in they stay float, with a warning.

    It would choose a free scale for them, by which onnxruntime computes something else when it optimizes the file.
    """
    from aimet_torch.nn.base import BaseQuantizationMixin

    create = BaseQuantizationMixin._create_int32_bias_quantizer
    names = set[str]()

    def created(module: Any, *args: Any) -> None:
        derived, derive = [], module._derive_bias_scale

        def noted(*scales: Any) -> Any:
            found = derive(*scales)
            derived.append(found)
            return found

        vars(module)["_derive_bias_scale"] = noted
        try:
            create(module, *args)
        finally:
            del vars(module)["_derive_bias_scale"]
        if not derived or derived[-1] is None:
            module.param_quantizers["bias"] = None
            weight = module.param_quantizers["weight"]
            names.add(getattr(weight, "place", "").rpartition(".")[0] or type(module).__name__)

    BaseQuantizationMixin._create_int32_bias_quantizer, _Constraining.rests = created, True
    try:
        yield
    finally:
        _Constraining.rests = False
        BaseQuantizationMixin._create_int32_bias_quantizer = create
    if names:
        what = ", ".join(sorted(names))
        warnings.warn(
            f"{what}: the bias stays float, since nothing quantizes the input; put a quantizer there", stacklevel=3
        )


@cache
def tools() -> dict[str, type]:
    """AIMET's `QuantizationSimModel` and the classes that make one of their own, constrained. Needs AIMET.

    `QuantizationSimModel`, `Adaround` (and its parameters) and `QuantAnalyzer`, with AIMET's signatures.
    """
    base: Any = load_aimet().QuantizationSimModel
    with quiet():
        from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
        from aimet_torch.quant_analyzer import QuantAnalyzer

    class ConstrainedSimModel(base):  # type: ignore[misc]
        """AIMET's, with AIMET's placement and power-of-two scales, however they are set."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            constrain(self)
            self.model.register_forward_pre_hook(_Constraining(self))

        def compute_encodings(self, *args: Any, **kwargs: Any) -> None:
            constrain(self)
            super().compute_encodings(*args, **kwargs)

        def load_encodings(self, encodings: Any, *args: Any, snap: bool | None = None, **kwargs: Any) -> None:
            """AIMET's. snap: True takes free scales, by the smallest 2^k that covers, without the warning."""
            constrain(self)
            with warnings.catch_warnings():
                if snap:
                    warnings.simplefilter("ignore", UserWarning)
                super().load_encodings(encodings, *args, **kwargs)

        def save_encodings_to_json(self, *args: Any, **kwargs: Any) -> None:
            constrain(self)
            super().save_encodings_to_json(*args, **kwargs)

        def get_activation_param_encodings(self) -> Any:
            constrain(self)
            return super().get_activation_param_encodings()

        def export(self, *args: Any, **kwargs: Any) -> None:
            constrain(self)
            with _derived_biases():
                super().export(*args, **kwargs)

        @property
        def onnx(self) -> Any:
            constrain(self)
            return _OnnxExporter(super().onnx)

    ConstrainedSimModel.__qualname__ = ConstrainedSimModel.__name__

    class ConstrainedAdaround(Adaround):  # type: ignore[misc]
        """AIMET's AdaRound, rounding on grids with power-of-two scales."""

        @staticmethod
        def _get_quantsim(
            model: nn.Module, dummy_input: Batch, quant_scheme: Any, default_param_bw: int, config_file: str | None
        ) -> Any:
            return ConstrainedSimModel(
                model, dummy_input, quant_scheme, default_param_bw=default_param_bw, config_file=config_file
            )

    class ConstrainedQuantAnalyzer(QuantAnalyzer):  # type: ignore[misc]
        """AIMET's QuantAnalyzer, of the network with power-of-two scales."""

        @staticmethod
        def _get_quantsim_cls() -> type:
            return ConstrainedSimModel

    return {
        "QuantizationSimModel": ConstrainedSimModel,
        "Adaround": ConstrainedAdaround,
        "AdaroundParameters": AdaroundParameters,
        "QuantAnalyzer": ConstrainedQuantAnalyzer,
    }


def configured(
    network: fx.GraphModule, example: Batch, plan: QuantPlan, config_file: str, bits: dict[str, int]
) -> QuantPlan:
    """The plan with what AIMET, given its configuration file or alias, quantizes and how, at the tensors of ours.

    network: prepared, batch norm folded. bits: AIMET's default widths, `default_output_bw` and `default_param_bw`.
    Where quantizers stand stays our choice (one per tensor, none in front of a ReLU): what AIMET leaves float there
    stays float, and each has the width and the symmetry that AIMET gives it.
    Raises ConfigError for a file that AIMET does not read, and for grids that cannot be constrained.
    """
    aimet = load_aimet()
    model = copied(network)
    readers = readers_of_inputs(model)
    x = tuple(x[:1].to(device_of(model)) for x in inputs(example))
    with quiet():
        try:
            sim = aimet.QuantizationSimModel(model, x, config_file=config_file, in_place=True, **bits)
            constrain(sim)
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"config_file: {config_file}: {str(error).strip().splitlines()[0]}") from error
    changes: list[tuple[str, dict[str, TensorSpec | None]]] = []
    for site in place(network, plan).sites:
        holder, key = readers.get(site.name, (site.module, 0))
        module: Any = sim.model.get_submodule(holder)
        if site.role == "bias":
            continue
        if site.role == "weight":
            quantizer = module.param_quantizers["weight"]
        else:
            quantizer = (module.output_quantizers if site.role == "output" else module.input_quantizers)[key]
        spec = plan.spec(site)
        assert spec is not None
        found = quantizer and replace(
            spec, bits=quantizer.bitwidth, symmetric=quantizer.symmetric, per_channel=bool(quantizer.shape)
        )
        changes.append((site.module, {site.role: found}))
    return replace(plan, overrides=(*plan.overrides, *changes))
