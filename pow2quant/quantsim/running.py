"""What happens around a call of `sim.model`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pow2quant.errors import NotCalibratedError
from pow2quant.quantsim.attributes import refuse_replaced
from pow2quant.quantsim.training import LOST

if TYPE_CHECKING:
    from torch import fx, nn


def checked(model: fx.GraphModule, args: Any, kwargs: Any) -> Any:
    """The arguments in float32, which the simulation computes in, whatever the user's network did.

    Raises NotCalibratedError, as AIMET does, unless the model is being observed or has nothing to quantize; ConfigError
    where a module's quantizers were replaced. Warns once, in training, of what is not random here.
    """
    refuse_replaced(model)
    if model.training and (lost := model.meta.pop(LOST, None)):
        warnings.warn(f"in training, {', '.join(lost)} drop nothing here", stacklevel=3)
    quantizers = [m for m in model.modules() if hasattr(m, "tap") and hasattr(m, "encoding")]
    if quantizers and not any(q.encoding is not None or q.tap is not None for q in quantizers):
        raise NotCalibratedError("the model has no encodings yet: call sim.compute_encodings or sim.load_encodings")
    return pytree.tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))


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
