"""What people save of a network: state dicts inside other things, under other names, pruned or parametrized."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pow2quant.errors import WeightsError

NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "model_state", "module", "params", "weights")
"""Keys under which checkpoints keep a state dict."""

AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
"""Keys of averaged weights, which are taken where there are no others."""

MOST_NESTED = 10
"""Checkpoints inside each other: one may contain itself."""

BESIDE = re.compile(r"(^|\.)(n_averaged|total_ops|total_params)$")
"""What averaging and counting of operations leave in a state dict, and no network reads."""


def state_dict(loaded: Any, path: str | Path) -> dict[str, Tensor]:
    """The tensors by name, out of the checkpoint dictionaries around them, of which one may be inside another.

    Raises WeightsError, naming the file, where there are none.
    """
    for _ in range(MOST_NESTED):
        if not isinstance(loaded, Mapping):
            break
        keys = (key for key in (*NESTED, *AVERAGED) if isinstance(loaded.get(key), Mapping))
        inner = next(keys, None)
        if inner is None:
            break
        loaded = loaded[inner]
    else:
        raise WeightsError(f"{path}: is nested more than {MOST_NESTED} times, or contains itself")
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path}: holds no state dict (tensors by name)")
    for key in tensors:
        if not isinstance(key, str):
            raise WeightsError(f"{path}: holds a tensor under {key!r:.80}; the names in a state dict are text")
    return tensors


def fitted(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict under a network's own names, where it can be seen how it belongs there; else as it is.

    Wrappers' prefixes go, and so does one that stands in front of the whole network (Lightning's `model.`); pruned
    weights are masked, those of weight norm multiplied out.
    """
    found = {_unwrapped(name, expected): value for name, value in state.items()}
    found = {name: value for name, value in found.items() if name in expected or not BESIDE.search(name)}
    found = dict(_merged(found))
    first = next((name for name in expected if not name.endswith("num_batches_tracked")), "")
    for prefix in (name.removesuffix(first) for name in found if name.endswith(f".{first}")):
        inner = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        if not _holds(found, expected) and _holds(inner, expected):
            return inner
    return found


def _unwrapped(name: str, expected: Mapping[str, Any]) -> str:
    """The name without the prefixes of torch.compile and DataParallel."""
    name = name.replace("_orig_mod.", "")
    while name not in expected and name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _holds(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> bool:
    """Whether all is there that the network needs."""
    return all(name in state or name.endswith("num_batches_tracked") for name in expected)


def _merged(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with one in place of the parts of which pruning and weight norm compute it."""
    for name, value in state.items():
        base, _, kind = name.rpartition("_")
        owner, _, leaf = name.partition(".parametrizations.")
        tensor, _, original = leaf.partition(".")
        if kind == "orig" and f"{base}_mask" in state:
            yield base, value * state[f"{base}_mask"]
        elif kind == "v" and f"{base}_g" in state:
            yield base, _normalized(value, state[f"{base}_g"])
        elif original == "original1" and f"{name[:-1]}0" in state:
            yield f"{owner}.{tensor}", _normalized(value, state[f"{name[:-1]}0"])
        elif not (
            (kind == "mask" and f"{base}_orig" in state)
            or (kind == "g" and f"{base}_v" in state)
            or (original == "original0" and f"{name[:-1]}1" in state)
        ):
            yield name, value


def _normalized(direction: Tensor, length: Tensor) -> Tensor:
    """Weight norm along the first dimension (Salimans & Kingma 2016, eq. 2): length * direction / |direction|."""
    return torch._weight_norm(direction, length, 0)
