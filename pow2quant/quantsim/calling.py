"""What a user's data loader and forward function give a simulation's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from pow2quant.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from pow2quant.backends.base import Batch


class _Seen(BaseException):
    """Ends a call of the model once its inputs are known."""


def call(model: nn.Module, data: Any) -> Any:
    """AIMET's default forward function: a tensor, or several in a tuple or a list, are the model's inputs."""
    return model(*((data,) if isinstance(data, torch.Tensor) else data))


def entering(
    model: nn.Module, loader: Iterable[Any], forward: Callable[[Any, Any], Any], most: int | None = None
) -> list[Batch]:
    """The inputs that the model is called with, for the first `most` elements of a loader; it does not run.

    most: None for all. forward: (model, element) -> anything. Raises DataError for no elements, and where it gives the
    model anything but tensors, in the order of its inputs.
    """
    found: list[Batch] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if kwargs or len(tensors) != len(args) or not args:
            raise DataError("the forward function has to give the model tensors, in the order of its inputs")
        tensors = [x.float() if x.is_floating_point() else x for x in tensors]
        found.append(tensors[0] if len(tensors) == 1 else tuple(tensors))
        raise _Seen

    handle = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        for data in islice(loader, most):
            with suppress(_Seen), torch.no_grad():
                forward(model, data)
    finally:
        handle.remove()
    if not found:
        raise DataError("the data loader gives nothing, or the forward function does not call the model")
    return found
