"""What a run is: plain frozen dataclasses, and strict reading from YAML. Below it, no module knows pydantic or YAML."""

from pow2quant.config.choices import EXPONENT_METHODS, NONE, Choice, method_named
from pow2quant.config.plan import BLOCK_BITS, BLOCKS, ROLES, QuantPlan, TensorSpec
from pow2quant.config.resolving import default_methods, dump, from_mapping, load, plan_of, read, with_values
from pow2quant.config.sections import (
    BATCH_NORMS,
    SENSITIVITIES,
    TERNARY,
    DataConfig,
    ModelConfig,
    PtqConfig,
    QuantizationConfig,
    ReportConfig,
    RunConfig,
    SearchConfig,
    TeacherConfig,
    TrainingConfig,
)
from pow2quant.config.users_code import from_file, is_in_file, users_code
from pow2quant.mappings.building import defaults, parameters
from pow2quant.mappings.legal import ABOVE_ZERO, FROM_ZERO, SHARE, Legal, finite, integer, one_of
from pow2quant.targets import WIDTHS

__all__ = [
    "ABOVE_ZERO",
    "BATCH_NORMS",
    "BLOCKS",
    "BLOCK_BITS",
    "EXPONENT_METHODS",
    "FROM_ZERO",
    "NONE",
    "ROLES",
    "SENSITIVITIES",
    "SHARE",
    "TERNARY",
    "WIDTHS",
    "Choice",
    "DataConfig",
    "Legal",
    "ModelConfig",
    "PtqConfig",
    "QuantPlan",
    "QuantizationConfig",
    "ReportConfig",
    "RunConfig",
    "SearchConfig",
    "TeacherConfig",
    "TensorSpec",
    "TrainingConfig",
    "default_methods",
    "defaults",
    "dump",
    "finite",
    "from_file",
    "from_mapping",
    "integer",
    "is_in_file",
    "load",
    "method_named",
    "one_of",
    "parameters",
    "plan_of",
    "read",
    "users_code",
    "with_values",
]
