"""A drop-in for AIMET's `QuantizationSimModel`: its constructor and methods, every scale a power of two.

    from pow2quant import QuantizationSimModel

    sim = QuantizationSimModel(model, dummy_input, default_param_bw=8, backend="custom")
    sim.compute_encodings(lambda model: model(images))
    sim.onnx.export(dummy_input, "model.onnx", encoding_version="2.0.0")

With `backend="aimet"` it is AIMET's own class, around the network as it is; only scales differ. With `custom`, which
needs no AIMET, `sim.model` is the prepared copy of the network, batch norm folded, with one quantizer per tensor;
biases are simulated as int32 on the lattice s_in * s_w, so their encodings always follow from the other scales and are
not loaded or frozen; without a `quant_scheme`, scales are those of least squared error, which at 2^k costs far less
accuracy than the extremes. What AIMET would do silently wrong raises an error.

`Adaround`, `QuantAnalyzer` (of this package) are AIMET's with the constraint in force; `apply_seq_mse`,
`reestimate_bn_stats` and `MixedPrecisionConfigurator` work on a simulation of both backends. AIMET's cross-layer
equalization works on the float network, its other tools on a simulation of `backend="aimet"`.
"""

from __future__ import annotations

from typing import Any

from pow2quant.quantsim.checks import check_accumulator_overflow as check_accumulator_overflow
from pow2quant.quantsim.model import QuantizationSimModel as QuantizationSimModel
from pow2quant.quantsim.schemes import QuantScheme as QuantScheme
from pow2quant.quantsim.tools import MixedPrecisionConfigurator as MixedPrecisionConfigurator
from pow2quant.quantsim.tools import apply_seq_mse as apply_seq_mse
from pow2quant.quantsim.tools import reestimate_bn_stats as reestimate_bn_stats


def __getattr__(name: str) -> Any:
    """AIMET's own classes, constrained: `Adaround`, `QuantAnalyzer`. Raises MissingExtraError without AIMET."""
    if name in ("Adaround", "AdaroundParameters", "QuantAnalyzer"):
        from pow2quant.backends.aimet.constrained import tools

        return tools()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
