"""One preparation for every backend: the user's network as a traced graph of modules from `operators.OPERATORS`.

Submodule names are kept. Functions (`F.relu`, `+`, `torch.cat`, `x.mean`, …) become modules named after the module in
whose `forward` they stand (`layer1.0.add`); a module that is called twice is copied (`layer1.0.relu_1`), its parameters
stay shared. Dropout and identities go. Batch norm stays where it is: `fold.fold_batch_norm` is a rewrite of its own.
"""

from __future__ import annotations

import copy
import operator as py
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from pow2quant.backends import modules as m
from pow2quant.backends import operators
from pow2quant.backends.base import Batch, inputs
from pow2quant.errors import ModelError, UnsupportedModelError, WeightsError

TORCH = str(Path(torch.__file__).parent)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
PREPARED = "pow2quant_prepared"
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


def prepare(model: nn.Module, example: Batch) -> fx.GraphModule:
    """The network as a float graph of modules, in eval mode, with shapes in `node.meta["shape"]`.

    model: left unchanged; the result holds copies. example: inputs of one call, (N, …) each; only its shapes count.
    Raises UnsupportedModelError (node, source line, what can be done), WeightsError for weights that are not finite,
    ModelError when the network fails on the example.
    """
    _check_finite(model)
    try:
        model = copy.deepcopy(model).eval().float().cpu()
    except RuntimeError as error:
        raise ModelError(f"the network cannot be copied: {_first_line(error)}") from error
    traced = _trace(model, len(inputs(example)))
    values = [_run(traced, _of_size(example, n)) for n in (2, 3)]
    builder = _Builder(traced, *values)
    network = builder.build()
    shapes = [_run(network, _of_size(example, n)) for n in (2, 3)]
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


def _check_same(builder: _Builder, network: fx.GraphModule, batch: tuple[Tensor, ...]) -> None:
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


def _trace(model: nn.Module, arguments: int) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        defaults = _unused_arguments(model, arguments)
        graph = tracer.trace(model, concrete_args=defaults or None)
    except fx.proxy.TraceError as error:
        raise UnsupportedModelError(
            f"the network cannot be traced{_user_line(error)}: {_first_line(error)} "
            "Control flow must not depend on tensors: move it out of forward, or quantize the parts on their own."
        ) from error
    except Exception as error:
        raise UnsupportedModelError(f"the network cannot be traced{_user_line(error)}: {_first_line(error)}") from error
    return fx.GraphModule(tracer.root, graph)


def _unused_arguments(model: nn.Module, given: int) -> dict[str, Any]:
    """Arguments of forward that the example does not fill, with their defaults."""
    import inspect

    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {p.name: p.default for p in plain[given:] if p.default is not p.empty}


def _first_line(error: BaseException) -> str:
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


def _run(module: fx.GraphModule, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    recorder = _Recorder(module)
    try:
        with torch.no_grad():
            recorder.run(*batch)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in batch)
        raise ModelError(f"the network fails on inputs of shape {shapes}: {_first_line(error)}") from error
    return recorder.values


Handler = Callable[["_Builder", fx.Node], fx.Node]


class _Builder:
    """Writes the module-only graph, node by node.

    first, second: every node's value for two batch sizes; what is no tensor is a constant, or depends on the batch.
    """

    def __init__(self, traced: fx.GraphModule, first: dict[str, Any], second: dict[str, Any]) -> None:
        self.traced, self.first, self.second = traced, first, second
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.taken = {name for name, _ in traced.named_modules()}
        self.overwriting = {name for name, m in traced.named_modules() if getattr(m, "inplace", False) is True}
        self.converted: list[tuple[fx.Node, fx.Node]] = []

    def build(self) -> fx.GraphModule:
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                if isinstance(self.first[node.name], Tensor):
                    self.new[node] = self.graph.placeholder(node.target)
            elif node.op == "output":
                self.graph.output(self._output(node))
            elif self._is_tensor(node):
                self.new[node] = result = self._convert(node)
                self.converted.append((node, result))
                if self._overwrites(node):
                    self.new[self._overwritten(node)] = result
        network = fx.GraphModule(self.modules, self.graph).eval()
        network.graph.eliminate_dead_code()
        network.delete_all_unused_submodules()
        network.recompile()
        return network

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.first[node.name], Tensor) and node.op != "get_attr"

    def _overwrites(self, node: fx.Node) -> bool:
        """Whether the operation writes into its first argument: who reads that later reads the result."""
        if node.op == "call_module":
            return str(node.target) in self.overwriting
        if node.op == "call_method":
            return _method_name(node) != node.target
        return node.kwargs.get("inplace") is True or node.target in OVERWRITING

    def _overwritten(self, node: fx.Node) -> fx.Node:
        target = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(target, fx.Node)
        return target

    def _output(self, node: fx.Node) -> Any:
        result = node.args[0]
        items: Sequence[Any] = result if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(i, fx.Node) and i in self.new for i in items):
            raise UnsupportedModelError(
                "the network must return a tensor or a tuple of tensors (computed from its inputs)"
            )
        mapped = tuple(self.new[i] for i in items)
        return mapped if isinstance(result, (tuple, list)) else mapped[0]

    def _convert(self, node: fx.Node) -> fx.Node:
        if node.op == "call_module":
            return self._module(node)
        name: Any = _method_name(node) if node.op == "call_method" else node.target
        handler = METHODS.get(name) if node.op == "call_method" else FUNCTIONS.get(name)
        if handler is None and getattr(node.target, "__name__", "") == "stochastic_depth":
            handler = _same
        if handler is None:
            label = name if isinstance(name, str) else getattr(name, "__name__", str(name))
            raise self.unsupported(node, f"{label}() is not supported")
        try:
            return handler(self, node)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise self.unsupported(node, f"not understood as it is written ({error})") from error

    def _module(self, node: fx.Node) -> fx.Node:
        module, name = self.traced.get_submodule(str(node.target)), str(node.target)
        if isinstance(module, IDENTITIES):
            return self.tensor(node, 0)
        rewrite = MODULES.get(type(module))
        if rewrite is not None:
            return rewrite(self, node)
        if isinstance(module, nn.Linear) and self.rank(node.args[0]) != 2:
            return self._linear_on_tokens(node, module)
        return self.call(node, module, *[self._mapped(node, a) for a in node.args], name=name)

    def _linear_on_tokens(self, node: fx.Node, module: nn.Linear) -> fx.Node:
        """A linear layer on (N, …, C) is one on (N·…, C) between two reshapes."""
        rows = self.call(node, m.Reshape((-1, module.in_features)), self.tensor(node, 0), kind="rows")
        result = self.call(node, module, rows, name=str(node.target))
        return self.call(node, m.Reshape(self.shape_with_batch(node)), result, kind="unrows")

    # -- what handlers use ---------------------------------------------------------------------------------------------

    def call(
        self, node: fx.Node, module: nn.Module, *args: fx.Node, name: str | None = None, kind: str | None = None
    ) -> fx.Node:
        """Adds a call of `module`, under the module's own name or one made of the scope and `kind`."""
        module.__class__ = m.EXACT.get(type(module), type(module))
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        if name is None:
            target = self._fresh(node, kind or type(module).__name__.lower())
        else:
            target, module = self._named(name, module)
        if not isinstance(module, BATCH_NORMS):
            operators.check(module, f"{target}{source_line(node)}")
        self.modules[target] = module
        return self.graph.call_module(target, args)

    def _named(self, name: str, module: nn.Module) -> tuple[str, nn.Module]:
        if name not in self.modules:
            return name, module
        count = 1
        while f"{name}_{count}" in self.taken:
            count += 1
        self.taken.add(f"{name}_{count}")
        return f"{name}_{count}", _sharing_copy(module)

    def _fresh(self, node: fx.Node, kind: str) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        scope = next(reversed(stack.values()), ("",))[0] if stack else ""
        if node.op == "call_module":
            scope = str(node.target).rpartition(".")[0]
        base = f"{scope}.{kind}" if scope else kind
        name, count = base, 0
        while name in self.taken or name in self.modules:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def argument(self, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """A non-tensor argument of the original call, constants resolved."""
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return fx.node.map_arg(value, lambda n: self._constant(node, n))

    def _constant(self, user: fx.Node, node: fx.Node) -> Any:
        first, second = self.first[node.name], self.second[node.name]
        if isinstance(first, Tensor):
            raise self.unsupported(user, "an argument is computed from data")
        if first != second:
            raise self.unsupported(user, "an argument depends on the batch size")
        return first

    def tensor(self, node: fx.Node, position: int, name: str = "input") -> fx.Node:
        """A tensor argument of the original call, in the new graph."""
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
        return self._mapped(node, value)

    def _mapped(self, node: fx.Node, value: Any) -> fx.Node:
        if isinstance(value, fx.Node) and value in self.new:
            return self.new[value]
        raise self.unsupported(node, "an operand is not computed from the network's inputs")

    def rank(self, node: Any) -> int:
        return len(self.first[node.name].shape)

    def shape(self, node: Any) -> tuple[int, ...]:
        return tuple(self.first[node.name].shape)

    def shape_with_batch(self, node: fx.Node) -> tuple[int, ...]:
        """The node's shape with -1 for the one dimension that grows with the batch."""
        first, second = self.first[node.name].shape, self.second[node.name].shape
        shape = [int(a) if a == b else -1 for a, b in zip(first, second, strict=True)]
        if shape.count(-1) != 1:
            raise self.unsupported(
                node, f"exactly one dimension must hold the batch, the result has shape {tuple(first)}"
            )
        return tuple(shape)

    def unsupported(self, node: fx.Node, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{node.name}{source_line(node)}: {why}. Write it with supported operations "
            f"({', '.join(sorted({t.__name__ for t in operators.OPERATORS}))}) or keep this part outside the network."
        )


def source_line(node: fx.Node) -> str:
    """Where a node stands in the user's code: ' (file.py:12 "x = torch.svd(x)")', or nothing."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.+)', node.stack_trace or "")
    frames = [f for f in frames if not f[0].startswith(TORCH)]
    return ' ({}:{} "{}")'.format(*frames[-1]) if frames else ""


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A second module with the same parameters."""
    twin = copy.copy(module)
    for store in ("_parameters", "_buffers", "_modules"):
        setattr(twin, store, dict(getattr(module, store)))
    return twin


OVERWRITING = (py.iadd, py.isub, py.imul, py.itruediv, torch.relu_, F.relu_)
"""Functions that write into their first argument, besides those that are asked to by `inplace`."""


def _method_name(node: fx.Node) -> str:
    """`relu_` and `relu` are the same here: a prepared graph has no in-place operations."""
    name = str(node.target)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


# -- handlers: one per function, method or module that is written differently ------------------------------------------


def _same(b: _Builder, node: fx.Node) -> fx.Node:
    return b.tensor(node, 0)


def _unary(make: Callable[[], nn.Module]) -> Handler:
    return lambda b, node: b.call(node, make(), b.tensor(node, 0))


def _parameter(b: _Builder, value: Any) -> Tensor | None:
    """The tensor behind a parameter or buffer that is an operand."""
    if isinstance(value, fx.Node) and isinstance(b.first[value.name], Tensor) and value not in b.new:
        tensor: Tensor = b.first[value.name].detach()
        return tensor
    return None


def _binary(make: Callable[[], nn.Module], scalar: Callable[[float, bool], m.Scale]) -> Handler:
    """Two activations; an activation and a number; or an activation and a per-channel parameter."""

    def handler(b: _Builder, node: fx.Node) -> fx.Node:
        if b.argument(node, 2, "alpha", 1) != 1:
            raise b.unsupported(node, "alpha, a factor of the second operand")
        left, right = _operand(node, 0, "input"), _operand(node, 1, "other")
        numbers = [_number(b, node, v) for v in (left, right)]
        if numbers[1] is not None:
            return b.call(node, scalar(numbers[1], False), b._mapped(node, left))
        if numbers[0] is not None:
            return b.call(node, scalar(numbers[0], True), b._mapped(node, right))
        parameters = [_parameter(b, v) for v in (left, right)]
        for parameter, other in ((parameters[1], left), (parameters[0], right)):
            if parameter is not None:
                return _per_channel(b, node, make(), parameter, other, swapped=other is right)
        return b.call(node, make(), b._mapped(node, left), b._mapped(node, right))

    return handler


def _operand(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs[name]


def _number(b: _Builder, node: fx.Node, value: Any) -> float | None:
    if isinstance(value, fx.Node) and not isinstance(b.first[value.name], Tensor):
        value = b._constant(node, value)
    if isinstance(value, (int, float)):
        return float(value)
    parameter = _parameter(b, value)
    return float(parameter) if parameter is not None and parameter.numel() == 1 else None


def _per_channel(b: _Builder, node: fx.Node, op: nn.Module, p: Tensor, x: Any, swapped: bool) -> fx.Node:
    """x * p or x ± p with one number per channel is a 1x1 depthwise convolution."""
    rank, channels = b.rank(x), b.shape(x)[1]
    wanted = (channels, *[1] * (rank - 2))
    if rank not in (3, 4) or tuple(p.shape[-(rank - 1) :]) != wanted or p.numel() != channels:
        raise b.unsupported(node, f"a parameter of shape {tuple(p.shape)} is combined with a tensor of rank {rank}")
    one = torch.ones(channels)
    if isinstance(op, m.Mul):
        weight, bias = p.flatten(), None
    elif isinstance(op, m.Add):
        weight, bias = one, p.flatten()
    else:
        weight, bias = (-one, p.flatten()) if swapped else (one, -p.flatten())
    return b.call(node, depthwise(weight, bias, rank), b._mapped(node, x), kind=type(op).__name__.lower())


def depthwise(weight: Tensor, bias: Tensor | None, rank: int) -> nn.Module:
    """weight * x + bias per channel as a convolution. weight, bias: (C,); rank: 3 for (N, C, L), 4 for (N, C, H, W)."""
    kind = nn.Conv2d if rank == 4 else nn.Conv1d
    conv = kind(len(weight), len(weight), 1, groups=len(weight), bias=bias is not None)
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(conv.weight.shape))
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv.eval()


def _concat(b: _Builder, node: fx.Node) -> fx.Node:
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if not isinstance(parts, (tuple, list)):
        raise b.unsupported(node, "cat() needs a list of tensors")
    dim = int(b.argument(node, 1, "dim", 0)) % len(b.shape(node))
    return b.call(node, m.Concat(dim), *[b._mapped(node, p) for p in parts])


def _mean(b: _Builder, node: fx.Node) -> fx.Node:
    x = _operand(node, 0, "input")
    rank = b.rank(x)
    dims = b.argument(node, 1, "dim")
    dims = sorted(int(d) % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank)))
    keepdim = bool(b.argument(node, 2, "keepdim", False))
    if 0 in dims:
        raise b.unsupported(node, "a mean over the batch")
    return b.call(node, m.Mean(dims, keepdim), b._mapped(node, x), kind="mean")


def _adaptive_pool(b: _Builder, node: fx.Node) -> fx.Node:
    """Global, or one that is a plain pool or a repetition for this input size."""
    given, wanted = b.shape(node.args[0])[2:], b.shape(node)[2:]
    name = str(node.target) if node.op == "call_module" else None
    x = b.tensor(node, 0)
    if given == wanted:
        return x
    if all(w == 1 for w in wanted):
        return b.call(node, m.Mean(range(2, 2 + len(wanted)), keepdim=True), x, name=name, kind="pool")
    if all(g % w == 0 for g, w in zip(given, wanted, strict=True)):
        kernel = tuple(g // w for g, w in zip(given, wanted, strict=True))
        pool = nn.AvgPool2d(kernel) if len(kernel) == 2 else nn.AvgPool1d(kernel[0])
        return b.call(node, pool, x, name=name, kind="pool")
    if all(w % g == 0 for g, w in zip(given, wanted, strict=True)):
        return b.call(
            node, m.NearestUpsample([w // g for g, w in zip(given, wanted, strict=True)]), x, name=name, kind="pool"
        )
    raise b.unsupported(
        node, f"adaptive pooling from {given} to {wanted}: the sizes must divide (choose another input size)"
    )


def _pool(module: type[nn.Module], names: Sequence[str]) -> Handler:
    def handler(b: _Builder, node: fx.Node) -> fx.Node:
        values = {n: b.argument(node, i + 1, n) for i, n in enumerate(names)}
        given = {k: v for k, v in values.items() if v is not None and v != []}
        return b.call(node, module(**given), b.tensor(node, 0), kind="pool")

    return handler


def _reshape(b: _Builder, node: fx.Node) -> fx.Node:
    if node.op == "call_module" and b.shape(node) == b.shape(node.args[0]):
        return b.tensor(node, 0)
    shape = b.shape_with_batch(node)
    name = str(node.target) if node.op == "call_module" else None
    flat = len(shape) == 2 and shape[0] == -1
    module = nn.Flatten(1) if flat and b.shape(node.args[0])[0] == b.shape(node)[0] else m.Reshape(shape)
    return b.call(node, module, b.tensor(node, 0), name=name, kind="flatten" if flat else "reshape")


def _permute(b: _Builder, node: fx.Node) -> fx.Node:
    dims: Any = node.args[1:] if len(node.args) > 2 else b.argument(node, 1, "dims")
    dims = [int(d) % b.rank(node.args[0]) for d in ([dims] if isinstance(dims, int) else dims)]
    return b.call(node, m.Permute(dims), b.tensor(node, 0))


def _transpose(b: _Builder, node: fx.Node) -> fx.Node:
    dims = list(range(b.rank(node.args[0])))
    i, j = (int(b.argument(node, p, n)) for p, n in ((1, "dim0"), (2, "dim1")))
    dims[i], dims[j] = dims[j], dims[i]
    return b.call(node, m.Permute(dims), b.tensor(node, 0), kind="permute")


def _getitem(b: _Builder, node: fx.Node) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise b.unsupported(node, "indexing of something that is no tensor")
    if not isinstance(b.first[source.name], Tensor):
        return _part(b, node, source)
    index = b.argument(node, 1, "index")
    index = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(i, (int, slice, type(...), type(None))) for i in index):
        raise b.unsupported(node, "indexing with a tensor or a list")
    return _sliced(b, node, source, index)


def _sliced(b: _Builder, node: fx.Node, source: fx.Node, index: tuple[Any, ...]) -> fx.Node:
    rank, shape = b.rank(source), b.shape(source)
    named = sum(isinstance(i, (int, slice)) for i in index)
    full = [j for i in index for j in ([slice(None)] * (rank - named) if i is ... else [i])]
    cuts, reshapes, dim = [], False, 0
    for i in full:
        reshapes |= not isinstance(i, slice)
        if i is None:
            continue
        one = slice(i, i + 1 or None) if isinstance(i, int) else i
        start, stop, step = one.indices(shape[dim]) if dim else (one.start or 0, one.stop, one.step or 1)
        if step < 1 or (dim == 0 and (start, stop, step) != (0, None, 1)):
            raise b.unsupported(node, "slicing backwards, or along the batch")
        if (start, stop, step) != (0, shape[dim], 1) and dim:
            cuts.append((dim, int(start), int(stop), int(step)))
        dim += 1
    current = b.new[source]
    if cuts:
        current = b.call(node, m.Slice(cuts), current)
    return b.call(node, m.Reshape(b.shape_with_batch(node)), current) if reshapes else current


def _part(b: _Builder, node: fx.Node, source: fx.Node) -> fx.Node:
    """One of the tensors that chunk or split returned."""
    target = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
    if target not in ("chunk", "split", "split_with_sizes"):
        raise b.unsupported(node, f"one of several results of {target}()")
    parts, at = b.first[source.name], int(b.argument(node, 1, "index"))
    dim = int(b.argument(source, 2, "dim", 0)) % parts[0].ndim
    start = sum(int(p.shape[dim]) for p in parts[: at % len(parts)])
    x = b._mapped(source, source.args[0])
    if dim == 0:
        raise b.unsupported(node, "splitting along the batch")
    return b.call(node, m.Slice([(dim, start, start + int(parts[at].shape[dim]), 1)]), x)


def _pad(b: _Builder, node: fx.Node) -> fx.Node:
    pads, mode, value = (
        b.argument(node, i, n, d) for i, n, d in ((1, "pad", None), (2, "mode", "constant"), (3, "value", 0))
    )
    if mode != "constant" or value not in (0, None) or min(pads) < 0:
        raise b.unsupported(node, f"padding with mode={mode!r}, value={value}, pad={tuple(pads)}; only zeros outside")
    return b.call(node, m.ZeroPad(pads), b.tensor(node, 0), kind="pad")


def _pad_module(b: _Builder, node: fx.Node) -> fx.Node:
    module: Any = b.traced.get_submodule(str(node.target))
    if getattr(module, "value", 0) != 0:
        raise b.unsupported(node, f"padding with {module.value}; only zeros")
    return b.call(node, m.ZeroPad(module.padding), b.tensor(node, 0), name=str(node.target))


def _interpolate(b: _Builder, node: fx.Node) -> fx.Node:
    is_module = node.op == "call_module"
    module: Any = b.traced.get_submodule(str(node.target)) if is_module else None
    mode = module.mode if is_module else b.argument(node, 3, "mode", "nearest")
    given, wanted = b.shape(node.args[0])[2:], b.shape(node)[2:]
    if mode != "nearest" or any(w % g for g, w in zip(given, wanted, strict=True)):
        raise b.unsupported(
            node, f"interpolation mode={mode!r} from {given} to {wanted}; only nearest by whole factors"
        )
    factors = [w // g for g, w in zip(given, wanted, strict=True)]
    return b.call(
        node,
        m.NearestUpsample(factors),
        b.tensor(node, 0),
        name=str(node.target) if is_module else None,
        kind="upsample",
    )


def _activation(names: dict[str, tuple[int, Any]], make: Callable[..., nn.Module]) -> Handler:
    """A function with parameters: name -> (position, default)."""
    return lambda b, node: b.call(
        node, make(*[b.argument(node, p, n, d) for n, (p, d) in names.items()]), b.tensor(node, 0)
    )


def _functional_layer(make: Callable[[_Builder, fx.Node, Tensor, Tensor | None], nn.Module], weight_at: int) -> Handler:
    """F.conv2d(x, self.weight, …) in a user's own module: PyTorch's module for it, under the owner's name."""

    def handler(b: _Builder, node: fx.Node) -> fx.Node:
        nodes = [
            node.args[i] if len(node.args) > i else node.kwargs.get(n)
            for i, n in ((weight_at, "weight"), (weight_at + 1, "bias"))
        ]
        tensors = [_parameter(b, n) for n in nodes]
        if tensors[0] is None or (nodes[1] is not None and tensors[1] is None):
            raise b.unsupported(node, "the weight is not a plain parameter")
        layer = make(b, node, tensors[0], tensors[1])
        with torch.no_grad():
            for name, value in zip(("weight", "bias"), tensors, strict=True):
                getattr(layer, name).copy_(value) if value is not None else None
        return b.call(node, layer.eval(), b.tensor(node, 0), name=_owner(b, nodes[0]))

    return handler


def _owner(b: _Builder, parameter: Any) -> str | None:
    """The module that a parameter belongs to, if it can be replaced: it has a name and holds no other modules."""
    owner = str(parameter.target).rpartition(".")[0] if isinstance(parameter, fx.Node) else ""
    return owner if owner and not list(b.traced.get_submodule(owner).children()) else None


def _make_linear(b: _Builder, node: fx.Node, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if b.rank(node.args[0]) != 2:
        raise b.unsupported(node, "F.linear on more than two dimensions; use nn.Linear")
    return nn.Linear(weight.shape[1], weight.shape[0], bias is not None)


def _make_conv(
    kind: type[nn.Conv1d] | type[nn.Conv2d],
) -> Callable[[_Builder, fx.Node, Tensor, Tensor | None], nn.Module]:
    def make(b: _Builder, node: fx.Node, weight: Tensor, bias: Tensor | None) -> nn.Module:
        names = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
        options = {n: b.argument(node, i + 3, n, d) for i, (n, d) in enumerate(names)}
        channels = weight.shape[1] * options["groups"]
        return kind(channels, weight.shape[0], tuple(weight.shape[2:]), bias=bias is not None, **options)  # type: ignore[arg-type]

    return make


def _layer_norm(b: _Builder, node: fx.Node) -> fx.Node:
    layer = nn.LayerNorm(b.argument(node, 1, "normalized_shape"), b.argument(node, 4, "eps", 1e-5))
    nodes = [node.args[i] if len(node.args) > i else node.kwargs.get(n) for i, n in ((2, "weight"), (3, "bias"))]
    with torch.no_grad():
        for name, operand in zip(("weight", "bias"), nodes, strict=True):
            value = _parameter(b, operand)
            if value is not None:
                getattr(layer, name).copy_(value)
    return b.call(node, layer.eval(), b.tensor(node, 0), name=_owner(b, nodes[0]))


def _softmax(b: _Builder, node: fx.Node) -> fx.Node:
    dim = b.argument(node, 1, "dim")
    if dim is None:
        raise b.unsupported(node, "softmax() without dim")
    return b.call(node, nn.Softmax(int(dim)), b.tensor(node, 0))


_add = _binary(m.Add, lambda c, _: m.Scale(1.0, c))
_sub = _binary(m.Sub, lambda c, swapped: m.Scale(-1.0, c) if swapped else m.Scale(1.0, -c))
_mul = _binary(m.Mul, lambda c, _: m.Scale(c))


def _div(b: _Builder, node: fx.Node) -> fx.Node:
    if node.kwargs.get("rounding_mode") is not None:
        raise b.unsupported(node, "division with a rounding mode")
    number = _number(b, node, _operand(node, 1, "other"))
    if number is None:
        raise b.unsupported(node, "division by a tensor")
    return b.call(node, m.Scale(1.0 / number), b.tensor(node, 0))


def _clamp(b: _Builder, node: fx.Node) -> fx.Node:
    low, high = b.argument(node, 1, "min"), b.argument(node, 2, "max")
    if low == 0 and high is None:
        return b.call(node, nn.ReLU(), b.tensor(node, 0))
    if low is None or high is None:
        raise b.unsupported(node, "clamp() needs both bounds (or min=0)")
    return b.call(node, nn.Hardtanh(float(low), float(high)), b.tensor(node, 0), kind="clamp")


_POOL = ("kernel_size", "stride", "padding")
_gelu = _activation({"approximate": (1, "none")}, nn.GELU)
_leaky = _activation({"negative_slope": (1, 0.01)}, nn.LeakyReLU)
_max_pool = _pool(nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode"))

METHODS: dict[str, Handler] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "mean": _mean, "clamp": _clamp,
    "relu": _unary(nn.ReLU), "sigmoid": _unary(nn.Sigmoid), "tanh": _unary(nn.Tanh), "softmax": _softmax,
    "view": _reshape, "reshape": _reshape, "flatten": _reshape, "squeeze": _reshape, "unsqueeze": _reshape,
    "permute": _permute, "transpose": _transpose, "contiguous": _same, "clone": _same, "detach": _same, "float": _same,
    "matmul": lambda b, n: b.call(n, m.MatMul(), b.tensor(n, 0), b.tensor(n, 1)),
    "__getitem__": _getitem,
}  # fmt: skip

FUNCTIONS: dict[Any, Handler] = {
    **dict.fromkeys((py.add, py.iadd, torch.add), _add),
    **dict.fromkeys((py.sub, py.isub, torch.sub), _sub),
    **dict.fromkeys((py.mul, py.imul, torch.mul), _mul),
    **dict.fromkeys((py.truediv, py.itruediv, torch.div), _div),
    **dict.fromkeys((py.matmul, torch.matmul, torch.bmm), METHODS["matmul"]),
    py.neg: lambda b, n: b.call(n, m.Scale(-1.0), b.tensor(n, 0)),
    py.getitem: _getitem,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concat),
    torch.mean: _mean,
    **dict.fromkeys((torch.clamp, torch.clip), _clamp),
    **{f: _unary(nn.ReLU) for f in (F.relu, torch.relu, F.relu_, torch.relu_)},
    F.relu6: _unary(nn.ReLU6), F.hardswish: _unary(nn.Hardswish), F.hardsigmoid: _unary(nn.Hardsigmoid),
    F.silu: _unary(nn.SiLU), F.gelu: _gelu, F.leaky_relu: _leaky, F.elu: _activation({"alpha": (1, 1.0)}, nn.ELU),
    F.hardtanh: _activation({"min_val": (1, -1.0), "max_val": (2, 1.0)}, nn.Hardtanh),
    **{f: _unary(nn.Sigmoid) for f in (torch.sigmoid, F.sigmoid)},
    **{f: _unary(nn.Tanh) for f in (torch.tanh, F.tanh)},
    **dict.fromkeys((F.softmax, torch.softmax), _softmax),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze), _reshape),
    torch.permute: _permute, torch.transpose: _transpose,
    F.pad: _pad, F.interpolate: _interpolate,
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d), _adaptive_pool),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.max_pool1d: _pool(nn.MaxPool1d, (*_POOL, "dilation", "ceil_mode")),
    F.avg_pool1d: _pool(nn.AvgPool1d, (*_POOL, "ceil_mode", "count_include_pad")),
    F.avg_pool2d: _pool(nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d), _same),
    F.linear: _functional_layer(_make_linear, 1),
    F.conv1d: _functional_layer(_make_conv(nn.Conv1d), 1), F.conv2d: _functional_layer(_make_conv(nn.Conv2d), 1),
    torch.conv2d: _functional_layer(_make_conv(nn.Conv2d), 1),
    F.layer_norm: _layer_norm,
}  # fmt: skip

MODULES: dict[type[nn.Module], Handler] = {
    nn.AdaptiveAvgPool1d: _adaptive_pool, nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _reshape, nn.Unflatten: _reshape,
    nn.ZeroPad2d: _pad_module, nn.ConstantPad2d: _pad_module, nn.ConstantPad1d: _pad_module,
    nn.Upsample: _interpolate, nn.UpsamplingNearest2d: _interpolate,
}  # fmt: skip
