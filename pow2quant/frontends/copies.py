"""Copies of networks that take no memory before they are changed (copy-on-write)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copied(network: M, known: Mapping[int, Any] | None = None) -> M:
    """A deep copy whose parameters and buffers lie where the network's do, until one of the two is written.

    known: further copies, by the id of what was copied.
    """
    found = {id(t): share(t) for t in chain(network.parameters(), network.buffers()) if _can_share(t)}
    return copy.deepcopy(network, {**found, **(known or {})})


def share(tensor: Tensor) -> Tensor:
    """A copy, in the same memory where PyTorch owns that."""
    try:
        made = torch._lazy_clone(tensor.detach())
    except RuntimeError:  # it is numpy's, or another process sees it
        made = tensor.detach().clone()
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def is_shared(tensor: Tensor) -> bool:
    """Whether the first write into it will be seen by no copy: nothing but PyTorch knows where it lies."""
    return torch._C._is_cow_tensor(tensor)  # type: ignore[attr-defined,no-any-return]


def array(tensor: Tensor) -> NDArray[Any]:
    """The values, copied: numpy's view of a tensor counts as a write, so that it would not be shared any more."""
    return np.asarray(tensor.detach().cpu().clone().numpy())


def address(tensor: Tensor) -> int:
    """Where its values lie; `data_ptr` counts as a write, too."""
    memory: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]
    return memory + int(tensor.storage_offset()) * tensor.element_size()


def _can_share(tensor: Tensor) -> bool:
    """Dense on the CPU; a part of a larger tensor would keep, and later copy, all of that."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    whole = plain and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return whole and not tensor.is_inference() and tensor.is_leaf
