"""The drop-in on AIMET with our placement."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pow2quant.artifact import Site
from pow2quant.backends.base import Batch
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import ConfigError
from pow2quant.quantsim.prepared import PreparedSim


class OnAimet(PreparedSim):
    """On AIMET, with our placement: everything else that AIMET's class has, from AIMET's own object."""

    frozen = property(lambda self: self._aimet.frozen, lambda self, value: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        type(self._aimet.quantsim).register(type(self))  # AIMET's functions ask for an instance of its class

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "simulation" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._aimet.quantsim, name)

    @property
    def _aimet(self) -> Any:
        return self.simulation

    def change(self, site: Site, spec: TensorSpec | None) -> None:
        """Raises ConfigError: AIMET's own quantizers are changed instead."""
        raise ConfigError(f'{site.name}: cannot be changed here; use placement="aimet"')

    def constrain(self) -> None:
        """Puts the constraint back after AIMET's mixed precision, which leaves plain quantizers; biases follow."""
        self._aimet.constrain()
        self.derive_biases()

    def _show(self) -> None:
        """AIMET's modules show their quantizers themselves."""

    def _trained(self) -> None:
        """AIMET's quantizers train their ranges themselves."""

    def _configured(
        self, network: Any, plan: QuantPlan, example: Batch, config_file: str, bits: dict[str, int]
    ) -> QuantPlan:
        from pow2quant.backends.aimet.constrained import configured

        return configured(network, example, plan, config_file, bits)

    def _replan(self) -> None:
        """AIMET's quantizers take widths with the encodings that are loaded."""

    def _mark(self, names: Collection[str], requires_grad: bool | None, allow_overwrite: bool | None) -> None:
        for quantizer in self._aimet.quantsim.quantizers():
            if quantizer.site.name in names:
                if requires_grad is not None:
                    quantizer.requires_grad_(requires_grad)
                if allow_overwrite is not None:
                    quantizer.allow_overwrite(allow_overwrite)


def _theirs(name: str) -> property:
    return property(lambda self: getattr(self._aimet.quantsim, name))


for _name in (
    "fold_param_quantizers",
    "exclude_layers_from_quantization",
    "exclude_param_from_quantization",
    "named_quantizers",
    "quantizers",
):
    setattr(OnAimet, _name, _theirs(_name))
