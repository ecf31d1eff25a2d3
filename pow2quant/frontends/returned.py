"""What the user's network returns: a prepared one returns each tensor once, in a tuple; here is the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pow2quant.errors import ConfigError
from pow2quant.frontends.batches import inputs

RETURNED = "pow2quant_returned"
"""Where a prepared network's `meta` keeps its `Returned`."""


@dataclass(frozen=True)
class Returned:
    """How the tensors of a prepared network stand in what the user's network returns.

    spec: the structure (dictionary, named tuple, nested, ...). leaves: in its order the index of a tensor of the
    prepared network, or, in a tuple of one, a value that is no tensor (None, a number).
    """

    spec: pytree.TreeSpec
    leaves: tuple[int | tuple[Any], ...]

    @classmethod
    def of(cls, spec: pytree.TreeSpec, leaves: Sequence[Any], results: dict[fx.Node, int]) -> Returned:
        """leaves: of the captured network. results: by captured node which of the prepared results it is."""
        return cls(spec, tuple(results[x] if isinstance(x, fx.Node) else (x,) for x in leaves))

    def of_results(self, results: Tensor | Sequence[Tensor]) -> Any:
        """The user's structure, with the prepared network's results."""
        tensors = inputs(results)
        found = [tensors[x] if isinstance(x, int) else x[0] for x in self.leaves]
        return pytree.tree_unflatten(found, self.spec)


def returning(network: nn.Module) -> nn.Module:
    """A quantized network that returns what the user's does: the same submodules, parameters and mode of training.

    The network itself, where it does so already.
    """
    returned: Returned | None = getattr(network, "meta", {}).get(RETURNED)
    if returned is None or returned.spec.is_leaf():
        return network
    shared = object.__new__(type(network))
    shared.__dict__.update(network.__dict__)
    shared._forward_hooks = OrderedDict(network._forward_hooks)
    shared.register_forward_hook(lambda module, args, results: returned.of_results(results))
    return shared


def like(network: nn.Module, user: nn.Module) -> nn.Module:
    """`returning`, with the methods and plain attributes of the user's network: `network.predict(x)`, `network[0]`.

    Its forward is the quantized one. What a Sequential has lost (a folded module) is an Identity, so that numbers stay;
    it has as many modules as the user's, and no parts of it can be taken, since quantizers stand between them.
    """
    own = () if isinstance(user, fx.GraphModule) else (type(user),)
    members = _sequence(list(user._modules)) if isinstance(user, nn.Sequential) else {}
    shared: fx.GraphModule = fx.GraphModule.__new__(type(type(user).__name__, (fx.GraphModule, *own), members))
    shared.__dict__.update({k: v for k, v in vars(user).items() if k not in vars(network)} | vars(returning(network)))
    shared._forward_hooks = OrderedDict(shared._forward_hooks)
    shared._forward_pre_hooks = OrderedDict(network._forward_pre_hooks)
    if isinstance(user, nn.Sequential):
        shared._modules = {name: nn.Identity() for name in user._modules} | network._modules
    shared.recompile()
    return shared


def _sequence(names: Sequence[str]) -> dict[str, Any]:
    """What makes a network with quantizers among its modules the user's Sequential of these names."""

    def item(self: nn.Module, index: int | slice) -> nn.Module | None:
        if isinstance(index, slice):
            raise ConfigError("a part of a quantized Sequential would lack the quantizers between its modules")
        return self._modules[names[index]]

    return {
        "__len__": lambda self: len(names),
        "__iter__": lambda self: (self._modules[name] for name in names),
        "__getitem__": item,
    }
