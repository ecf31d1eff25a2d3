"""Power-of-two quantization of PyTorch networks: one network, many executors, zero differing bits.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pow2quant.artifact import Agreement, Artifact, Site
    from pow2quant.config import QuantPlan, RunConfig, TensorSpec
    from pow2quant.errors import Pow2QuantError
    from pow2quant.frontends.prepare import prepare
    from pow2quant.pow2_constraints import Encoding, IntGrid
    from pow2quant.quantsim import QuantizationSimModel, QuantScheme
    from pow2quant.runs import Result, Simulated, Validation, certificate, export, ptq, quantize, simulate, validate
    from pow2quant.three_steps import qat, qat_model

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Artifact",
    "Encoding",
    "IntGrid",
    "Pow2QuantError",
    "QuantPlan",
    "QuantScheme",
    "QuantizationSimModel",
    "Result",
    "RunConfig",
    "Simulated",
    "Site",
    "TensorSpec",
    "Validation",
    "__version__",
    "certificate",
    "export",
    "prepare",
    "ptq",
    "qat",
    "qat_model",
    "quantize",
    "simulate",
    "validate",
]

_HOMES = {
    "Agreement": "artifact",
    "Artifact": "artifact",
    "Site": "artifact",
    "prepare": "frontends.prepare",
    "QuantPlan": "config",
    "RunConfig": "config",
    "TensorSpec": "config",
    "Pow2QuantError": "errors",
    "export": "runs",
    "ptq": "runs",
    "qat": "three_steps",
    "qat_model": "three_steps",
    "quantize": "runs",
    "Result": "runs",
    "Simulated": "runs",
    "Validation": "runs",
    "certificate": "runs",
    "simulate": "runs",
    "validate": "runs",
    "QuantScheme": "quantsim",
    "QuantizationSimModel": "quantsim",
    "Encoding": "pow2_constraints",
    "IntGrid": "pow2_constraints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pow2quant' has no attribute {name!r}")
    return getattr(import_module(f"pow2quant.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
