"""The user's containers in a prepared network: `network.layer1[0]` works where `model.layer1[0]` did."""

from __future__ import annotations

from torch import fx, nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def restore_containers(network: fx.GraphModule, model: nn.Module) -> None:
    """Gives the plain modules that hold others the type of the user's container, and the user's order of submodules.

    What a Sequential or ModuleList has lost (a folded or dropped module) is an Identity, so that numbers stay.
    """
    for path, user in model.named_modules():
        holder = _submodule(network, path)
        if holder is None:
            continue
        _reorder(holder, user)
        kind = next((k for k in CONTAINERS if isinstance(user, k)), None)
        if kind is None or type(holder) is not nn.Module or not path:
            continue
        container, kept = kind(), {name: x for name, x in holder._modules.items() if x is not None}
        for name in user._modules:
            if name in kept or kind is not nn.ModuleDict:
                container._modules[name] = kept.pop(name, nn.Identity())
        container._modules.update(kept)
        container.training = holder.training
        network.set_submodule(path, container)


def _submodule(network: nn.Module, path: str) -> nn.Module | None:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def _reorder(holder: nn.Module, user: nn.Module) -> None:
    order = {name: i for i, name in enumerate(user._modules)}
    items = sorted(holder._modules.items(), key=lambda item: order.get(item[0], len(order)))
    holder._modules.clear()
    holder._modules.update(items)
