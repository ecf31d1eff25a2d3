"""Migration: factors of powers of two from activations into weights, between a norm and the linear layers behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from pow2quant.backends.base import Batch
from pow2quant.config import SHARE
from pow2quant.errors import DataError
from pow2quant.frontends import modules as m
from pow2quant.frontends.operators import called
from pow2quant.methods.equalization import run_hooked

NORMS = (nn.LayerNorm, nn.RMSNorm)

MOST = 12
"""No factor is beyond 2^MOST, or below 2^-MOST: gamma is an integer of 15 bits."""


def factors(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """s_j = max|X_j|^a / max|W_j|^(1 - a) (SmoothQuant, Xiao et al. 2023, eq. 4), rounded to powers of two, (C,).

    activations, weights: the largest magnitudes per channel, (C,). strength: a. Channels that are 0 keep a factor of 1.
    The channels of the activation are divided by s, the columns of the weights multiplied.
    """
    exponents = (strength * activations.log2() - (1 - strength) * weights.log2()).round()
    known = torch.isfinite(exponents)
    middle = exponents[known].median() if known.any() else 0.0  # a factor of all channels changes nothing
    return torch.where(known, (exponents - middle).clamp(-MOST, MOST), 0.0).exp2()


def groups(network: fx.GraphModule) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Each norm over the last dimension of which linear layers alone read the result, with these layers.

    Views, cuts and joins of the other dimensions may lie between. Parameters that other modules share stay as they are.
    """
    uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")

    def own(node: fx.Node) -> bool:
        parameters = network.get_submodule(str(node.target)).parameters()
        return calls[node.target] == 1 and all(uses[id(p)] == 1 for p in parameters)

    found = []
    for node in network.graph.nodes:
        module = called(network, node)
        if isinstance(module, NORMS) and len(module.normalized_shape) == 1 and module.weight is not None:
            readers = _readers(network, node)
            if readers and all(own(n) for n in (node, *readers)):
                found.append((node, readers))
    return found


def _readers(network: fx.GraphModule, norm: fx.Node) -> list[fx.Node]:
    """The linear layers that read a norm's result; none where anything else computes with it."""
    carried, readers = {norm}, []
    for node in network.graph.nodes:
        sources = node.all_input_nodes
        if carried.isdisjoint(sources):
            continue
        if isinstance(called(network, node), nn.Linear):
            readers.append(node)
        elif carried.issuperset(sources) and _keeps_channels(called(network, node), node):
            carried.add(node)
        else:
            return []
    return readers


def _keeps_channels(module: nn.Module | None, node: fx.Node) -> bool:
    """Whether the last dimension of a result is that of the operands, and nothing is computed."""
    shape = node.all_input_nodes[0].meta["shape"]
    last = len(shape) - 1
    if isinstance(module, m.Reshape):
        return bool(node.meta["shape"][-1:] == shape[-1:])
    if isinstance(module, m.Permute):
        return module.dims[-1] % len(shape) == last
    if isinstance(module, m.Slice):
        return all(int(cut[0]) % len(shape) != last for cut in module.slices)
    if isinstance(module, (m.Concat, m.Take)):
        return module.dim % len(shape) != last
    return isinstance(module, m.ZeroPad) and not any(module.pads[:2])


def peaks(network: fx.GraphModule, norms: Iterable[fx.Node], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The largest magnitude of every channel of their results, (C,), by module. Raises DataError for no batches."""
    found: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, entering: Any, y: Tensor) -> None:
            highest = y.detach().abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found.get(name, highest), highest)

        return hook

    names = [str(node.target) for node in norms]
    hooks = [network.get_submodule(name).register_forward_hook(look(name)) for name in names]
    run_hooked(network, batches, hooks)
    if hooks and not found:
        raise DataError("the calibration data are empty")
    return found


@dataclass(frozen=True)
class Migrate:
    """Evens out the channels behind LayerNorm and RMSNorm: their factors go into the linear layers behind.

    SmoothQuant (Xiao et al. 2023) with powers of two: the float network computes the same bits, and no operation is
    added. strength: 0 evens out the weights' columns, 1 the activations' channels.
    """

    deterministic: ClassVar[bool] = True

    strength: Annotated[float, SHARE] = 0.5

    @torch.no_grad()
    def rewrite(self, network: fx.GraphModule, batches: Iterable[Batch]) -> fx.GraphModule:
        """Rewrites in place, and returns the network. Raises DataError for no batches."""
        found = groups(network)
        highest = peaks(network, [norm for norm, _ in found], batches)
        for norm, readers in found:
            weights = [network.get_parameter(f"{node.target}.weight") for node in readers]
            heaviest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
            s = factors(highest[str(norm.target)], heaviest, self.strength)
            for parameter in network.get_submodule(str(norm.target)).parameters():
                parameter.div_(s)
            for weight in weights:
                weight.mul_(s)
        return network
