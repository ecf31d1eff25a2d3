"""One preparation for every backend: the user's network as a traced graph of modules from `operators.OPERATORS`.

Submodule names are kept. Functions (`F.relu`, `+`, `torch.cat`, `x.mean`, …) become modules named after the module in
whose `forward` they stand (`layer1.0.add`); a module that is called twice is copied (`layer1.0.relu_1`), its parameters
stay shared. Dropout and identities go. Batch norm stays where it is: `fold.fold_batch_norm` is a rewrite of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from pow2quant.backends.base import Batch, inputs
from pow2quant.backends.builder import Builder
from pow2quant.backends.conversions import CONVERSIONS
from pow2quant.backends.tracing import first_line, record, source_line, trace
from pow2quant.errors import ModelError, UnsupportedModelError, WeightsError

PREPARED = "pow2quant_prepared"


def prepare(model: nn.Module, example: Batch) -> fx.GraphModule:
    """The network as a float graph of modules, in eval mode, with shapes in `node.meta["shape"]`.

    model: left unchanged; the result holds copies. example: inputs of one call, (N, …) each; what counts is their
    shapes, and how large their values are.
    Raises UnsupportedModelError (node, source line, what can be done), WeightsError for weights that are not finite,
    ModelError when the network fails on the example.
    """
    _check_finite(model)
    try:
        model = copy.deepcopy(model).eval().float().cpu()
    except RuntimeError as error:
        raise ModelError(f"the network cannot be copied: {first_line(error)}") from error
    traced = trace(model, len(inputs(example)))
    values = [record(traced, _of_size(example, n)) for n in (2, 3)]
    builder = Builder(traced, values[0], values[1], CONVERSIONS)
    network = builder.build()
    shapes = [record(network, _of_size(example, n)) for n in (2, 3)]
    for node in network.graph.nodes:
        first, second = (s.get(node.name) for s in shapes)
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            node.meta["shape"] = tuple(first.shape)
            node.meta["free"] = tuple(a != b for a, b in zip(first.shape, second.shape, strict=True))
    _check_same(builder, network, _of_size(example, 2))
    _check_traced(model, traced, _of_size(example, 2))
    network.meta[PREPARED] = True
    return network


def is_prepared(network: nn.Module) -> bool:
    """Whether `prepare` made it."""
    return isinstance(network, fx.GraphModule) and PREPARED in network.meta


class _Checked(fx.Interpreter):
    """Runs the prepared network, and goes on with the user's values after each node that agrees with them.

    So every node is compared on its own: rounding differences do not add up through a deep network.
    """

    def __init__(self, network: fx.GraphModule, converted: dict[str, tuple[fx.Node, Tensor]]) -> None:
        super().__init__(network)
        self.converted = converted

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.converted:
            return value
        node, expected = self.converted[n.name]
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        close = {"rtol": 1e-3, "atol": 1e-4 * scale + 1e-12}
        if value.shape != expected.shape or not torch.allclose(value, expected, equal_nan=True, **close):
            raise UnsupportedModelError(
                f"{node.name}{source_line(node)}: this operation is not prepared as it is written (an argument that is "
                "not supported, or a tensor that is overwritten while a view of it is read); please write it in "
                "another way"
            )
        return expected.clone()


def _check_same(builder: Builder, network: fx.GraphModule, batch: tuple[Tensor, ...]) -> None:
    """The claim of this file, checked on random data: the prepared network computes what the user's does."""
    converted = {result.name: (node, builder.first[node.name]) for node, result in builder.converted}
    with torch.no_grad():
        _Checked(network, converted).run(*batch)


def _check_traced(model: nn.Module, traced: fx.GraphModule, batch: tuple[Tensor, ...]) -> None:
    """The same for what tracing made of the network."""
    with torch.no_grad():
        results = [network(*(x.clone() for x in batch)) for network in (model, traced)]
    expected, got = (list(r) if isinstance(r, (tuple, list)) else [r] for r in results)
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in zip(expected, got, strict=True)):
        raise UnsupportedModelError(
            "the network does not compute the same when it is traced: what forward does depends on more than its inputs"
        )


def _check_finite(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(
                f"{name}: has no shape yet (a lazy module); run the network on an example once, then save it"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{name}: the weights hold NaN or infinity")


def _of_size(example: Batch, n: int) -> tuple[Tensor, ...]:
    """n samples of the example's shape and size of values, each another."""
    generator = torch.Generator().manual_seed(0)

    def varied(x: Tensor) -> Tensor:
        first = x[:1].detach().cpu().float()
        spread = float(first.abs().max()) or 1.0
        return first + 0.5 * spread * torch.randn(n, *x.shape[1:], generator=generator)

    return tuple(varied(x) for x in inputs(example))
