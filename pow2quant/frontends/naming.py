"""Under which names modules stand in a prepared network: the user's, or names made of where they are called."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec

from pow2quant.frontends.captured import arguments, scope

COMPOSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Transformer, nn.TransformerEncoderLayer)
"""Modules of PyTorch's own that are more than one operation."""


class Names:
    """users: the user's modules by path. written: those of the prepared network, as far as it is written.

    keys: what placeholders of the captured graph are called in the user's state. layers: the modules that become layers
    of their own name: nothing can be put inside them.
    """

    def __init__(self, model: nn.Module, written: Mapping[str, nn.Module]) -> None:
        self.users = dict(model.named_modules(remove_duplicate=False))
        self.written = written
        self.taken = set(self.users)
        self.keys: dict[fx.Node, str] = {}
        self.layers: set[str] = set()

    def read(self, graph: fx.Graph, specs: Mapping[str, InputSpec]) -> None:
        """Finds the keys and layers of a captured graph."""
        for node in graph.nodes:
            if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
                self.keys[node] = str(specs[node.name].target)
            owner = self.users.get(scope(node)) if node.op == "call_function" else None
            if owner is not None and [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]:
                weight = getattr(arguments(node), "weight", None)
                if isinstance(weight, fx.Node) and (name := self.owner(node, weight, None)):
                    self.layers.add(name)

    def owner(self, node: fx.Node, weight: Any, held: Any) -> str | None:
        """The name for a layer: the module that has `weight`, if that holds no other modules. held: its values."""
        path = scope(node)
        owner = self.users.get(path)
        if owner is not None and path and (_is_one_operation(owner) or _is_layer(owner)):
            return path
        own = [] if owner is None or not path or _children(owner) else owner.parameters(recurse=False)
        if any(p is held for p in own):
            return path
        path = self.keys.get(weight, "").rpartition(".")[0]
        owner = self.users.get(path)
        return path if path and owner is not None and not _children(owner) else None

    def of(self, node: fx.Node, kind: str) -> str:
        """The name for a module without weights: that of the user's, or one made of the scope and `kind`."""
        path = scope(node)
        owner = self.users.get(path)
        if owner is not None and path and _is_one_operation(owner) and not list(owner.parameters(recurse=False)):
            return self.free(path)
        while path in self.layers:
            path = path.rpartition(".")[0]
        base, count = f"{path}.{kind}" if path else kind, 0
        name = base
        while name in self.taken or name in self.written:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return writable(name)

    def free(self, name: str) -> str:
        """The name, or, where it is taken by an earlier call, the name with a number."""
        if name not in self.written:
            return writable(name)
        count = 1
        while f"{name}_{count}" in self.taken:
            count += 1
        self.taken.add(f"{name}_{count}")
        return writable(f"{name}_{count}")


def _is_one_operation(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own for one operation, a subclass that computes as it does, or says that it is."""
    if getattr(module, "one_operation", False) and not _children(module):
        return True
    forward = type(module).forward
    own = getattr(forward, "__module__", "") or ""
    return own.startswith("torch.nn.") and not isinstance(module, COMPOSED) and not _children(module)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a subclass of a convolution or linear layer, whatever its forward does to the weight."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not _children(module)


def _children(module: nn.Module) -> list[str]:
    """The names of the modules inside, without those that compute a parameter."""
    return [name for name, _ in module.named_children() if name != "parametrizations"]


def writable(name: str) -> str:
    """A module's name as Python code can write it: the graph's code is `self.layer1.conv(x)`."""
    parts = [re.sub(r"[\"'\\\n\r\t]", "_", part) for part in name.split(".")]
    return ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in parts)
