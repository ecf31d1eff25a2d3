"""What happens around a call of `sim.model`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pow2quant.errors import ConfigError, NotCalibratedError
from pow2quant.quantsim.attributes import refuse_replaced
from pow2quant.quantsim.training import LOST

if TYPE_CHECKING:
    from torch import fx, nn


OWNER = "_simulation"
"""The attribute of a model that holds its simulation."""


class Owner:
    """Keeps a simulation as long as its model is there. A copy of the model has none."""

    def __init__(self, sim: Any = None) -> None:
        self.sim = sim

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, ()

    @staticmethod
    def adopt_widths(model: nn.Module, _: Any) -> None:
        """Behind `load_state_dict`: the simulation's widths are those of the state."""
        owner = vars(model).get(OWNER)
        if owner is not None and owner.sim is not None:
            owner.sim.adopt_widths()


def checked(model: fx.GraphModule, args: Any, kwargs: Any) -> Any:
    """The arguments in float32, which the simulation computes in, whatever the user's network did.

    Raises NotCalibratedError, as AIMET does, unless the model is being observed or every quantizer has an encoding;
    ConfigError where a module or its quantizers were replaced, and for an argument that the network was prepared
    without, unless it is None. Warns once, in training, of what is not random here.
    """
    refuse_replaced(model)
    args, kwargs = _without_absent(model, args, kwargs)
    if model.training and (lost := model.meta.pop(LOST, None)):
        warnings.warn(f"in training, {', '.join(lost)} drop nothing here", stacklevel=3)
    if missing := _missing(model):
        raise NotCalibratedError(f"the model has {missing} yet: call sim.compute_encodings or sim.load_encodings")
    return pytree.tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))


def _missing(model: nn.Module) -> str:
    """What a model lacks: all encodings, or that of a site; empty where it lacks none, or is observed."""
    owner = vars(model).get(OWNER)
    quantizers: list[Any] = [m for m in model.modules() if hasattr(m, "tap") and hasattr(m, "encoding")]
    if any(q.tap is not None for q in quantizers):
        return ""
    known = None if owner is None or owner.sim is None else {s.name for s in owner.sim.sites if s.role != "bias"}
    having = [bool(q.encoded) if hasattr(q, "encoded") else q.encoding is not None for q in quantizers]
    if quantizers and not any(having):
        return "no encodings"
    if known is None:  # a copy does not know which quantizers are in use
        return ""
    lacking = (q.site.name for q, has in zip(quantizers, having, strict=True) if not has and q.site.name in known)
    return next((f"no encoding for {name}" for name in lacking), "")


def _without_absent(model: fx.GraphModule, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments without those that are None and that the network was prepared without."""
    names = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
    if len(args) > len(names) >= sum(x is not None for x in args):
        args = tuple(x for x in args if x is not None)
    absent = {f"argument {i}": x for i, x in enumerate(args[len(names) :], len(names))}
    absent |= {name: x for name, x in kwargs.items() if name not in names}
    for name, x in absent.items():
        if x is not None:
            raise ConfigError(f"{name}: the network was prepared without it; leave it out, or give it in dummy_input")
    return args[: len(names)], {name: x for name, x in kwargs.items() if name in names}


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; then every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
