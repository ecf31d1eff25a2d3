"""The encodings in the `state_dict()` of a model on `custom`, as AIMET's quantizers have theirs there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.errors import EncodingError, FileFormatError
from pow2quant.foreign import parsed
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from torch import nn

RANGES = "learned_ranges"
"""The parameters of ranges that are trained, in a model."""

KEPT = "_encodings_are_kept"
"""The attribute of a model whose state has encodings."""

KEY = "encoding"
"""Behind a quantizer's name, the key of its encoding in a state."""


def keep(model: nn.Module) -> None:
    """Makes the encodings part of a model's state, once. A state without them, of a float network, changes none."""
    if not vars(model).get(KEPT, False):
        vars(model)[KEPT] = True
        model.register_state_dict_post_hook(_write)
        model.register_load_state_dict_pre_hook(_read)


def _quantizers(model: nn.Module, prefix: str) -> dict[str, FakeQuantize]:
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantize))
    return {f"{prefix}{name}.{KEY}": module for name, module in found}


def _write(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, quantizer in _quantizers(model, prefix).items():
        state[key] = _to_tensor(quantizer.encoding)
    for key in [key for key in state if key.startswith(f"{prefix}{RANGES}.")]:  # they follow from the encodings
        del state[key]


def _read(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key, quantizer in _quantizers(model, prefix).items():
        if key in state:
            quantizer.encoding = _from_tensor(key, state.pop(key))
    for index, parameter in enumerate(getattr(model, RANGES, ())):
        state[f"{prefix}{RANGES}.{index}"] = parameter.detach()


def _to_tensor(e: Encoding | None) -> Tensor:
    """JSON as bytes: a state is loaded without running code, and safetensors takes it."""
    lists = e and {"scale": e.scale.tolist(), "zero_point": e.zero_point.tolist()}
    fields = e and {**(lists or {}), "axis": e.axis, "block": e.block, **vars(e.grid)}
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def _from_tensor(key: str, state: Tensor) -> Encoding | None:
    """The inverse of `_to_tensor`. Raises FileFormatError, naming the key, for anything else."""
    try:
        fields = parsed(bytes(state.tolist()))
        if fields is None:
            return None
        grid = IntGrid.of(fields["bits"], fields["signed"], fields["narrow"])
        scale, zero_point = np.array(fields["scale"], np.float32), np.array(fields["zero_point"], np.int64)
        return Encoding(scale, zero_point, grid, fields["axis"], fields.get("block"))
    except (EncodingError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{key}: not the encoding that `state_dict` of a simulation has: {error}") from error
