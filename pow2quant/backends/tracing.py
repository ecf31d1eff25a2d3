"""Tracing with torch.fx, and running what was traced: values, lines of the user's code, first lines of errors."""

from __future__ import annotations

import inspect
import operator as py
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant.errors import ModelError, UnsupportedModelError

TORCH = str(Path(torch.__file__).parent / "_")[:-1]
"""The folder of PyTorch's own files, with the separator behind it (torchvision lies beside it)."""


class _Proxy(fx.Proxy):
    """A traced value on which `+=` and the like write, as they do on a tensor."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._written(py.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._written(py.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._written(py.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._written(py.itruediv, other)

    def _written(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    record_stack_traces = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(model: nn.Module, arguments: int) -> fx.GraphModule:
    """The network's calls as a graph; `arguments`: how many of forward's arguments are given, the others keep defaults.

    Raises UnsupportedModelError with the user's source line.
    """
    tracer = _Tracer()
    try:
        defaults = _unused_arguments(model, arguments)
        graph = tracer.trace(model, concrete_args=defaults or None)
    except fx.proxy.TraceError as error:
        raise UnsupportedModelError(
            f"the network cannot be traced{_user_line(error)}: {first_line(error)} "
            "Control flow must not depend on tensors: move it out of forward, or quantize the parts on their own."
        ) from error
    except Exception as error:
        raise UnsupportedModelError(f"the network cannot be traced{_user_line(error)}: {first_line(error)}") from error
    return fx.GraphModule(tracer.root, graph)


def _unused_arguments(model: nn.Module, given: int) -> dict[str, Any]:
    """Arguments of forward that the example does not fill, with their defaults."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {p.name: p.default for p in plain[given:] if p.default is not p.empty}


def first_line(error: BaseException) -> str:
    """An error's text as one sentence."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line if line.endswith(".") else f"{line}."


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is not PyTorch's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(TORCH)]
    frames = [f for f in frames if f.filename != __file__]
    return f' at {frames[-1].filename}:{frames[-1].lineno} "{frames[-1].line}"' if frames else ""


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # A copy: what is overwritten later must stay here as it was.
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


def record(module: fx.GraphModule, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    """Every node's value, by node name. Raises ModelError when the network fails on the batch."""
    recorder = _Recorder(module)
    try:
        with torch.no_grad():
            recorder.run(*batch)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in batch)
        raise ModelError(f"the network fails on inputs of shape {shapes}: {first_line(error)}") from error
    return recorder.values


def source_line(node: fx.Node) -> str:
    """Where a node stands in the user's code: ' (file.py:12 "x = torch.svd(x)")', or nothing."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.+)', node.stack_trace or "")
    frames = [f for f in frames if not f[0].startswith(TORCH)]
    return ' ({}:{} "{}")'.format(*frames[-1]) if frames else ""
