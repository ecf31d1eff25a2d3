"""What `sim.model` has for those who train it: dropout, and an answer where batch norm was."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pow2quant.frontends.containers import restore_containers
from pow2quant.frontends.dropouts import DROPOUT
from pow2quant.frontends.modules import BATCH_NORMS
from pow2quant.frontends.prepare import dropouts

RANDOM = ("StochasticDepth", "DropPath")
"""Modules that leave no trace in a network that was captured in eval mode."""

LOST = "pow2quant_lost"
"""Where a model's `meta` keeps what is random in the user's network in training, and not here."""


class FoldedBatchNorm(_BatchNorm):
    """Stands where a batch norm was that is folded. What asks for its statistics or parameters gets an error."""

    def __init__(self, where: str) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "where", where)

    def forward(self, input: Tensor) -> Tensor:
        return input

    def _refuse(self, name: str) -> AttributeError:
        where = vars(self).get("where", "")
        kept = 'backend="aimet", placement="aimet" keeps it'
        return AttributeError(f"{where}: batch norm is folded, it has no {name}; {kept}")

    def __getattr__(self, name: str) -> Any:
        raise self._refuse(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self):  # a module's own, such as `training` and `_modules`, which copies replace
            raise self._refuse(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in state_dict:
            if key.startswith(prefix):
                raise self._refuse(key.removeprefix(prefix))

    def extra_repr(self) -> str:
        return str(self.where)


def batch_norms(network: nn.Module) -> list[str]:
    """The names of its batch norms."""
    return [name for name, module in network.named_modules() if isinstance(module, BATCH_NORMS)]


def restore(model: nn.Module, user: nn.Module, norms: list[str]) -> None:
    """Puts dropout back into a simulation's model, and marks where the batch norms of these names were.

    A batch norm that became a layer of its own has the mark inside. Of what is random in training and cannot be put
    back, `model.meta` keeps the names.
    """
    assert isinstance(model, fx.GraphModule)
    for name in norms:
        taken = any(node.op == "call_module" and node.target == name for node in model.graph.nodes)
        model.add_submodule(f"{name}.batch_norm" if taken else name, FoldedBatchNorm(name))
    restored = set()
    for node in list(model.graph.nodes):
        for index, parts in node.meta.get(DROPOUT, {}).items():
            source = value = node.all_input_nodes[index]
            for name, module in parts:
                model.add_submodule(name, module)
                restored.add(name)
                with model.graph.inserting_before(node):
                    value = model.graph.call_module(name, (value,))
            node.replace_input_with(source, value)
    model.recompile()
    restore_containers(model, user)
    model.meta[LOST] = sorted({*dropouts(model), *_random(user)} - restored)


def _random(user: nn.Module) -> list[str]:
    found = []
    for name, module in user.named_modules():
        rate = getattr(module, "dropout", 0)  # of attention and recurrent layers
        if type(module).__name__ in RANDOM or (isinstance(rate, float) and rate > 0):
            found.append(name)
    return found
