"""AIMET's tools that are given a simulation: of ours on `custom`, of AIMET's own on `aimet`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pow2quant.quantsim import bn_reestimation, mixed_precision, sequential_mse
from pow2quant.quantsim.attributes import owner_of
from pow2quant.quantsim.on_aimet import OnAimet
from pow2quant.quantsim.prepared import PreparedSim

if TYPE_CHECKING:
    from torch import nn


def apply_seq_mse(sim: Any, *args: Any, **kwargs: Any) -> None:
    """AIMET's SeqMSE; on `custom` see `quantsim.sequential_mse.apply_seq_mse`, with the same arguments."""
    tool = sequential_mse.apply_seq_mse if _on_custom(sim) else _theirs("apply_seq_mse")
    tool(sim, *args, **kwargs)


def reestimate_bn_stats(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """AIMET's batch norm re-estimation, given `sim.model`; on `custom` see `quantsim.bn_reestimation`."""
    sim: Any = owner_of(model)
    if sim is not None:
        return bn_reestimation.reestimate_bn_stats(sim, *args, **kwargs)
    return _theirs("reestimate_bn_stats")(model, *args, **kwargs)


class MixedPrecisionConfigurator:
    """AIMET's manual mixed precision; on `custom` see `quantsim.mixed_precision`, with the same methods."""

    def __new__(cls, sim: Any) -> Any:
        return mixed_precision.MixedPrecisionConfigurator(sim) if _on_custom(sim) else _theirs(cls.__name__)(sim)


def _on_custom(sim: Any) -> bool:
    return isinstance(sim, PreparedSim) and not isinstance(sim, OnAimet)


def _theirs(name: str) -> Any:
    from pow2quant.backends.aimet.modules import own_tool

    return own_tool(name)
