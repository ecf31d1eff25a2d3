"""AIMET's `QuantizationSimModel`, with every scale a power of two (see `pow2quant.quantsim`)."""

from __future__ import annotations

from abc import ABC
from typing import Any

from pow2quant.errors import ConfigError
from pow2quant.quantsim.on_aimet import OnAimet
from pow2quant.quantsim.prepared import PreparedSim

PLACEMENTS = ("pow2quant", "aimet")
"""Where quantizers may stand: ours, one per tensor, or AIMET's."""


class QuantizationSimModel(PreparedSim, ABC):
    """Simulates a quantized network with AIMET's interface (see the package).

    model: left unchanged. dummy_input: inputs of one call, (N, …) each. quant_scheme: AIMET's, or its name; None takes
    the encodings of least squared error. default_output_bw, default_param_bw: 2 to 16; from 32 on, or with a
    `default_data_type` of float and 32 bits, these tensors stay float. config_file: AIMET's files and aliases; with
    `custom` the part that has a meaning here (`adapters.aimet_config`). placement: where quantizers stand, "aimet" (the
    default with `backend="aimet"`: an object of AIMET's own class, around the network as it is, quantizers where AIMET
    puts them; only scales differ) or "pow2quant" (one per tensor of the prepared network, equal bits on both backends).
    Raises UnsupportedModelError, WeightsError and ModelError as `prepare` does, ConfigError for impossible arguments.
    """

    def __new__(
        cls, *args: Any, backend: str = "custom", placement: str | None = None, **kwargs: Any
    ) -> QuantizationSimModel:
        """A simulation on `aimet` is of AIMET's own class, or, with our placement, has what that class has."""
        if placement not in (None, *PLACEMENTS):
            raise ConfigError(f"placement: {placement!r} is not one of {', '.join(PLACEMENTS)}")
        if placement == "aimet" and backend != "aimet":
            raise ConfigError('placement: AIMET\'s own places need backend="aimet"')
        if backend == "aimet" and placement != "pow2quant":
            from pow2quant.backends.aimet.constrained import tools

            own: Any = QuantizationSimModel.register(tools()["QuantizationSimModel"])
            made: QuantizationSimModel = own(*args, **kwargs)
            return made
        if backend == "aimet":
            ours: Any = QuantizationSimModel.register(OnAimet)
            prepared: QuantizationSimModel = ours(*args, backend=backend, placement=placement, **kwargs)
            return prepared
        return super().__new__(cls)
