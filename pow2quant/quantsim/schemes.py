"""What AIMET's arguments say of widths and ranges, as a plan."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

from pow2quant.config import WIDTHS, QuantPlan, TensorSpec
from pow2quant.errors import ConfigError


class QuantScheme(Enum):
    """AIMET's schemes, for scripts without AIMET; its own enumeration and its names are understood too."""

    min_max = 1
    post_training_tf = min_max
    post_training_tf_enhanced = 2
    training_range_learning_with_tf_init = 3
    training_range_learning_with_tf_enhanced_init = 4
    post_training_percentile = 6


RANGES = {
    "min_max": "minmax",
    "tf": "minmax",
    "post_training_tf": "minmax",
    "training_range_learning_with_tf_init": "minmax",
    "tf_enhanced": "mse",
    "post_training_tf_enhanced": "mse",
    "training_range_learning_with_tf_enhanced_init": "mse",
    "percentile": "percentile",
    "post_training_percentile": "percentile",
}
"""AIMET's quantization schemes and our choosers."""


def chooser_of(scheme: Any) -> str:
    """Our chooser for AIMET's scheme. Raises ConfigError for an unknown one."""
    name = getattr(scheme, "name", scheme)
    if name not in RANGES:
        raise ConfigError(f"quant_scheme: {name!r} is not one of {', '.join(RANGES)}")
    return RANGES[name]


def plan_of(chooser: str, bits: dict[str, int], data_type: str) -> QuantPlan:
    """The plan of AIMET's default widths. Raises ConfigError for widths that there are not."""
    if data_type not in ("int", "float"):
        raise ConfigError(f"default_data_type: {data_type!r} is not int or float")
    for key, width in bits.items():
        if width < 32 and (data_type == "float" or width not in WIDTHS["output"]):
            raise ConfigError(f"{key}: {width} bits; integers have 2 to 16, float tensors 32")
    legal = {key: width if width < 32 else 8 for key, width in bits.items()}
    plan = QuantPlan.default(legal["default_param_bw"], legal["default_output_bw"])

    def role(spec: TensorSpec | None, key: str) -> TensorSpec | None:
        return replace(spec, range=chooser) if spec is not None and bits[key] < 32 else None

    output, weight = role(plan.output, "default_output_bw"), role(plan.weight, "default_param_bw")
    return replace(plan, weight=weight, output=output, input=role(plan.input, "default_output_bw"))
