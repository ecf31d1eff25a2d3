"""AIMET itself, and what stands for our modules in it: the same computation between AIMET's quantizers."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from pow2quant.errors import MissingExtraError
from pow2quant.frontends import modules as m
from pow2quant.frontends.operators import OPERATORS

ONNX_TYPES: dict[type, str] = {
    m.Permute: "Transpose",
    m.Mean: "ReduceMean",
    m.NearestUpsample: "Resize",
    m.ZeroPad: "Pad",
}
"""How AIMET's configuration files and tools call our modules, where that is not the class's name."""


def __getattr__(name: str) -> Any:
    """Classes that derive from AIMET's exist once AIMET is imported; `pickle` finds them here."""
    for cls in _modules() if name.startswith("Quantized") else ():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Entry(nn.Module):
    """Passes an input of the network on, where several modules read it: its one reader, for AIMET."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@contextmanager
def quiet() -> Iterator[None]:
    """AIMET's log lines and the warnings that it causes are dropped, unless the logger `pow2quant` is at DEBUG."""
    if logging.getLogger("pow2quant").isEnabledFor(logging.DEBUG):
        yield
        return
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def make_known(cls: type) -> None:
    """Lets AIMET's functions, where AIMET is loaded, find the quantizers of another backend.

    They have none of its methods, so that its context managers raise where they would do nothing, without a word.
    """
    if "aimet_torch" in sys.modules:
        from aimet_torch.nn import QuantizationMixin

        base: Any = next(c for c in QuantizationMixin.__mro__ if c.__name__ == "BaseQuantizationMixin")
        base.register(cls)


def shipped(config_file: str) -> Path:
    """A configuration file, by its path, or by the alias or name that AIMET has for one of its own.

    Without AIMET, and where there is no such file, it stays what it is.
    """
    path = Path(config_file)
    if path.exists() or find_spec("aimet_torch") is None:
        return path
    load_aimet()
    from aimet_torch.common.quantsim_config.quantsim_config import _get_config_file

    try:
        return Path(_get_config_file(config_file))
    except FileNotFoundError:
        return path


@cache
def load_aimet() -> Any:
    """The module `aimet_torch`, which knows our modules from then on. Raises MissingExtraError."""
    with quiet():
        try:
            import aimet_torch
            from aimet_torch.nn import QuantizationMixin
        except ModuleNotFoundError as error:
            raise MissingExtraError("the aimet backend needs aimet-torch: pip install 'pow2quant[aimet]'") from error
    from aimet_torch.onnx_utils import map_torch_types_to_onnx

    for cls in (*OPERATORS, Entry):
        if cls not in QuantizationMixin.cls_to_qcls:
            map_torch_types_to_onnx.setdefault(cls, [ONNX_TYPES.get(cls, cls.__name__)])
            QuantizationMixin.implements(cls)(_quantized(cls, QuantizationMixin))
    return aimet_torch


TOOLS = {
    "apply_seq_mse": "aimet_torch.seq_mse",
    "reestimate_bn_stats": "aimet_torch.bn_reestimation",
    "MixedPrecisionConfigurator": "aimet_torch.mixed_precision",
}
"""AIMET's tools that are given a simulation, and where they live."""


def own_tool(name: str) -> Any:
    """One of AIMET's `TOOLS`. Raises MissingExtraError without AIMET."""
    load_aimet()
    with quiet():
        return getattr(import_module(TOOLS[name]), name)


def _modules() -> list[type]:
    """What stands for our modules in AIMET."""
    known = load_aimet().nn.QuantizationMixin.cls_to_qcls
    return [known[cls] for cls in (*OPERATORS, Entry) if known[cls].__module__ == __name__]


def _quantized(cls: type[nn.Module], mixin: type) -> type:
    """The class that AIMET puts in the place of one of ours: the same computation between its quantizers."""

    def forward(self: Any, *tensors: Tensor) -> Tensor:
        pairs = zip_longest(tensors, self.input_quantizers[: len(tensors)])
        with self._patch_quantized_parameters():
            result = cls.forward(self, *(x if q is None else q(x) for x, q in pairs))
        (quantizer,) = self.output_quantizers
        quantized: Tensor = result if quantizer is None else quantizer(result)
        return quantized

    def __quant_init__(self: Any) -> None:
        mixin.__quant_init__(self)  # type: ignore[attr-defined]
        code = cls.forward.__code__
        count = code.co_argcount - 1 + bool(code.co_flags & 4)  # `*tensors` begins with one
        self.input_quantizers = nn.ModuleList([None] * count)  # type: ignore[list-item]

    members = {
        "__module__": __name__,
        "forward": forward,
        "__quant_init__": __quant_init__,
        "_supports_dynamic_input_count": classmethod(lambda _: bool(cls.forward.__code__.co_flags & 4)),
    }
    return type(f"Quantized{cls.__name__}", (mixin, cls), members)


def readers_of_inputs(model: fx.GraphModule) -> dict[str, tuple[str, int]]:
    """For every input of the network the module that reads it, and as which of its inputs.

    AIMET quantizes an input where it is read. One that is read more than once gets an `Entry` in front.
    """
    readers = {}
    for node in [n for n in model.graph.nodes if n.op == "placeholder"]:
        uses = [(user, i) for user in node.users for i, a in enumerate(user.args) if a is node]
        if len(uses) != 1 or uses[0][0].op != "call_module":
            model.add_submodule(f"{node.name}_entry", Entry())
            with model.graph.inserting_after(node):
                entry = model.graph.call_module(f"{node.name}_entry")
            node.replace_all_uses_with(entry)
            entry.args = (node,)
            uses = [(entry, 0)]
        readers[str(node.target)] = (str(uses[0][0].target), uses[0][1])
    model.recompile()
    return readers
