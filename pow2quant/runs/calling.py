"""Calling a float network with its data for the first time, and with tensors in a row from then on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pow2quant import datasets
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.errors import DataError, ModelError
from pow2quant.frontends.batches import call_arguments, inputs
from pow2quant.reading import Checked, Signature

COMMON_CHANGES = {
    "a batch seems to be one sample: stack samples to (N, ...), or give a Dataset": lambda x: x[None],
    "the network seems to want the channels first: x.movedim(-1, 1)": lambda x: x.movedim(-1, 1),
    "the network seems to want floats, scaled as in training: x.float()": lambda x: x.float(),
    "an item of the data seems to be a batch: give DataLoader(data, batch_size=None)": lambda x: x[0],
}
"""What is often wrong with inputs, in words, and the change that shows it."""


class Called(NamedTuple):
    """A network's first call. data: read as the network takes them; sample: one, as it is called with it.

    shapes: of one sample of the inputs and of the outputs, without the batch. targets: of the first test batch.
    """

    data: datasets.Data
    sample: Any
    shapes: tuple[list[tuple[int, ...]], list[tuple[int, ...]]]
    targets: Any


def first_call(model: nn.Module, data: datasets.Data) -> Called:
    """Calls a network with the first calibration sample: by the arguments of `forward`, else with the batch as it is.

    Raises DataError for data that are empty, ModelError when the network fails on the sample or is quantized already.
    """
    if any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ModelError("the network is quantized already; give the float one")
    signature = Signature.of(model)
    try:
        return _called(model, data, signature)
    except ModelError as error:
        with suppress(ModelError, DataError):
            return _called(model, data, replace(signature, whole=True))
        raise error


def _called(model: nn.Module, data: datasets.Data, signature: Signature) -> Called:
    data = data.with_parts(lambda part: replace(part, signature=signature))
    first = next(cast(Checked, data.calibration).structured(), None)
    if first is None:
        raise DataError("the calibration data are empty")
    sample = pytree.tree_map(lambda x: x[:1], first[0])
    try:
        outputs = _outputs(model, sample)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] + _advice(model, first[0])
        name = cast(Checked, data.calibration).name
        whose = "the embedded digits; --data names yours" if name.startswith("digits:") else name
        raise ModelError(f"the network fails on a sample of {described(sample)} ({whose}): {reason}") from error
    if not outputs:
        raise ModelError("the network returns no tensor")
    shapes = [tuple(x.shape[1:]) for x in inputs(sample)], [tuple(x.shape[1:]) for x in outputs]
    return Called(data, sample, shapes, next((targets for _, targets in data.test), None))


def described(batch: Any) -> str:
    """Shapes and types of the tensors in a batch: `(1, 3, 8, 8) float32`."""
    return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs(batch))


def _outputs(model: nn.Module, called: Any) -> tuple[Tensor, ...]:
    """The network's tensors for inputs as it is called with them."""
    args, kwargs = call_arguments(model, called)
    with torch.no_grad():
        return inputs(model(*args, **kwargs))


def _advice(model: nn.Module, called: Any) -> str:
    """What would let the network take these inputs, where a common change does."""
    for words, change in COMMON_CHANGES.items():
        with suppress(Exception):
            _outputs(model, pytree.tree_map(change, called))
            return f"; {words}"
    return ""


class Flat(nn.Module):
    """A network that takes its inputs in a row, whatever containers it is written for, and returns tensors in a row."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        """example: inputs as `model` is called with them."""
        super().__init__()
        self.model = model
        self.structure = pytree.tree_structure(example)

    def forward(self, *tensors: Tensor) -> Any:
        args, kwargs = call_arguments(self.model, pytree.tree_unflatten(tensors, self.structure))
        results = inputs(self.model(*args, **kwargs))
        return results[0] if len(results) == 1 else results
