"""The modules that the front ends put in the place of functions, so that a prepared network consists of modules only.

Where float32 leaves the last bit to the implementation, they compute in float64 and round once, which is what an
executor that is right to half an ulp gives too.
"""

from torch import nn

from pow2quant.frontends.modules.arithmetic import Add, MatMul, Mean, Mul, Scale, Sub
from pow2quant.frontends.modules.constants import ArgMax, Constant, Embedding, Expand
from pow2quant.frontends.modules.functions import ELU, GELU, HardSwish, Sigmoid, SiLU, Tanh
from pow2quant.frontends.modules.normalization import BATCH_NORMS, LayerNorm, Softmax
from pow2quant.frontends.modules.shape import Concat, NearestUpsample, Permute, Reshape, Slice, ZeroPad
from pow2quant.frontends.modules.weighted import depthwise

__all__ = [
    "BATCH_NORMS",
    "ELU",
    "EXACT",
    "GELU",
    "Add",
    "ArgMax",
    "Concat",
    "Constant",
    "Embedding",
    "Expand",
    "HardSwish",
    "LayerNorm",
    "MatMul",
    "Mean",
    "Mul",
    "NearestUpsample",
    "Permute",
    "Reshape",
    "Scale",
    "SiLU",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Sub",
    "Tanh",
    "ZeroPad",
    "depthwise",
]

EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Hardswish: HardSwish,
    nn.Sigmoid: Sigmoid,
    nn.Tanh: Tanh,
    nn.SiLU: SiLU,
    nn.GELU: GELU,
    nn.ELU: ELU,
    nn.Softmax: Softmax,
    nn.LayerNorm: LayerNorm,
    nn.Embedding: Embedding,
}
"""PyTorch's modules and ours that stand in for them; each takes over the other's attributes."""
