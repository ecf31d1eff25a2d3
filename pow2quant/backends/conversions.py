"""How functions, methods and modules are written in a prepared network: one handler and one row each."""

from __future__ import annotations

import operator as py
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant.backends.builder import Builder, Conversions, Handler
from pow2quant.frontends import modules as m


def _same(b: Builder, node: fx.Node) -> fx.Node:
    return b.tensor(node, 0)


def _unary(make: Callable[[], nn.Module]) -> Handler:
    return lambda b, node: b.call(node, make(), b.tensor(node, 0))


def _parameter(b: Builder, value: Any) -> Tensor | None:
    """The tensor behind a parameter or buffer that is an operand."""
    if isinstance(value, fx.Node) and isinstance(b.first[value.name], Tensor) and value not in b.new:
        tensor: Tensor = b.first[value.name].detach()
        return tensor
    return None


def _binary(make: Callable[[], nn.Module], scalar: Callable[[float, bool], m.Scale]) -> Handler:
    """Two activations; an activation and a number; or an activation and a per-channel parameter."""

    def handler(b: Builder, node: fx.Node) -> fx.Node:
        if b.argument(node, 2, "alpha", 1) != 1:
            raise b.unsupported(node, "alpha, a factor of the second operand")
        left, right = _operand(node, 0, "input"), _operand(node, 1, "other")
        numbers = [_number(b, node, v) for v in (left, right)]
        if numbers[1] is not None:
            return b.call(node, scalar(numbers[1], False), b.mapped(node, left))
        if numbers[0] is not None:
            return b.call(node, scalar(numbers[0], True), b.mapped(node, right))
        parameters = [_parameter(b, v) for v in (left, right)]
        for parameter, other in ((parameters[1], left), (parameters[0], right)):
            if parameter is not None:
                return _per_channel(b, node, make(), parameter, other, swapped=other is right)
        return b.call(node, make(), b.mapped(node, left), b.mapped(node, right))

    return handler


def _operand(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs[name]


def _number(b: Builder, node: fx.Node, value: Any) -> float | None:
    if isinstance(value, fx.Node) and not isinstance(b.first[value.name], Tensor):
        value = b.constant(node, value)
    if isinstance(value, (int, float)):
        return float(value)
    parameter = _parameter(b, value)
    return float(parameter) if parameter is not None and parameter.numel() == 1 else None


def _per_channel(b: Builder, node: fx.Node, op: nn.Module, p: Tensor, x: Any, swapped: bool) -> fx.Node:
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
    return b.call(node, m.depthwise(weight, bias, rank), b.mapped(node, x), kind=type(op).__name__.lower())


def _concat(b: Builder, node: fx.Node) -> fx.Node:
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if not isinstance(parts, (tuple, list)):
        raise b.unsupported(node, "cat() needs a list of tensors")
    dim = int(b.argument(node, 1, "dim", 0)) % len(b.shape(node))
    return b.call(node, m.Concat(dim), *[b.mapped(node, p) for p in parts])


def _mean(b: Builder, node: fx.Node) -> fx.Node:
    x = _operand(node, 0, "input")
    rank = b.rank(x)
    dims = b.argument(node, 1, "dim")
    dims = sorted(int(d) % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank)))
    keepdim = bool(b.argument(node, 2, "keepdim", False))
    if 0 in dims:
        raise b.unsupported(node, "a mean over the batch")
    return b.call(node, m.Mean(dims, keepdim), b.mapped(node, x), kind="mean")


def _adaptive_pool(b: Builder, node: fx.Node) -> fx.Node:
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
    def handler(b: Builder, node: fx.Node) -> fx.Node:
        values = {n: b.argument(node, i + 1, n) for i, n in enumerate(names)}
        given = {k: v for k, v in values.items() if v is not None and v != []}
        return b.call(node, module(**given), b.tensor(node, 0), kind="pool")

    return handler


def _reshape(b: Builder, node: fx.Node) -> fx.Node:
    if node.op == "call_module" and b.shape(node) == b.shape(node.args[0]):
        return b.tensor(node, 0)
    shape = b.shape_with_batch(node)
    name = str(node.target) if node.op == "call_module" else None
    flat = len(shape) == 2 and shape[0] == -1
    module = nn.Flatten(1) if flat and b.shape(node.args[0])[0] == b.shape(node)[0] else m.Reshape(shape)
    return b.call(node, module, b.tensor(node, 0), name=name, kind="flatten" if flat else "reshape")


def _permute(b: Builder, node: fx.Node) -> fx.Node:
    dims: Any = node.args[1:] if len(node.args) > 2 else b.argument(node, 1, "dims")
    dims = [int(d) % b.rank(node.args[0]) for d in ([dims] if isinstance(dims, int) else dims)]
    return b.call(node, m.Permute(dims), b.tensor(node, 0))


def _transpose(b: Builder, node: fx.Node) -> fx.Node:
    dims = list(range(b.rank(node.args[0])))
    i, j = (int(b.argument(node, p, n)) for p, n in ((1, "dim0"), (2, "dim1")))
    dims[i], dims[j] = dims[j], dims[i]
    return b.call(node, m.Permute(dims), b.tensor(node, 0), kind="permute")


def _getitem(b: Builder, node: fx.Node) -> fx.Node:
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


def _sliced(b: Builder, node: fx.Node, source: fx.Node, index: tuple[Any, ...]) -> fx.Node:
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


def _part(b: Builder, node: fx.Node, source: fx.Node) -> fx.Node:
    """One of the tensors that chunk or split returned."""
    target = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
    if target not in ("chunk", "split", "split_with_sizes"):
        raise b.unsupported(node, f"one of several results of {target}()")
    parts, at = b.first[source.name], int(b.argument(node, 1, "index"))
    dim = int(b.argument(source, 2, "dim", 0)) % parts[0].ndim
    start = sum(int(p.shape[dim]) for p in parts[: at % len(parts)])
    x = b.mapped(source, source.args[0])
    if dim == 0:
        raise b.unsupported(node, "splitting along the batch")
    return b.call(node, m.Slice([(dim, start, start + int(parts[at].shape[dim]), 1)]), x)


def _pad(b: Builder, node: fx.Node) -> fx.Node:
    pads, mode, value = (
        b.argument(node, i, n, d) for i, n, d in ((1, "pad", None), (2, "mode", "constant"), (3, "value", 0))
    )
    if mode != "constant" or value not in (0, None) or min(pads) < 0:
        raise b.unsupported(node, f"padding with mode={mode!r}, value={value}, pad={tuple(pads)}; only zeros outside")
    return b.call(node, m.ZeroPad(pads), b.tensor(node, 0), kind="pad")


def _pad_module(b: Builder, node: fx.Node) -> fx.Node:
    module: Any = b.traced.get_submodule(str(node.target))
    if getattr(module, "value", 0) != 0:
        raise b.unsupported(node, f"padding with {module.value}; only zeros")
    return b.call(node, m.ZeroPad(module.padding), b.tensor(node, 0), name=str(node.target))


def _interpolate(b: Builder, node: fx.Node) -> fx.Node:
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


def _functional_layer(make: Callable[[Builder, fx.Node, Tensor, Tensor | None], nn.Module], weight_at: int) -> Handler:
    """F.conv2d(x, self.weight, …) in a user's own module: PyTorch's module for it, under the owner's name."""

    def handler(b: Builder, node: fx.Node) -> fx.Node:
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


def _owner(b: Builder, parameter: Any) -> str | None:
    """The module that a parameter belongs to, if it can be replaced: it has a name and holds no other modules."""
    owner = str(parameter.target).rpartition(".")[0] if isinstance(parameter, fx.Node) else ""
    return owner if owner and not list(b.traced.get_submodule(owner).children()) else None


def _make_linear(b: Builder, node: fx.Node, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if b.rank(node.args[0]) != 2:
        raise b.unsupported(node, "F.linear on more than two dimensions; use nn.Linear")
    return nn.Linear(weight.shape[1], weight.shape[0], bias is not None)


def _make_conv(
    kind: type[nn.Conv1d] | type[nn.Conv2d],
) -> Callable[[Builder, fx.Node, Tensor, Tensor | None], nn.Module]:
    def make(b: Builder, node: fx.Node, weight: Tensor, bias: Tensor | None) -> nn.Module:
        names = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
        options = {n: b.argument(node, i + 3, n, d) for i, (n, d) in enumerate(names)}
        channels = weight.shape[1] * options["groups"]
        return kind(channels, weight.shape[0], tuple(weight.shape[2:]), bias=bias is not None, **options)  # type: ignore[arg-type]

    return make


def _layer_norm(b: Builder, node: fx.Node) -> fx.Node:
    layer = nn.LayerNorm(b.argument(node, 1, "normalized_shape"), b.argument(node, 4, "eps", 1e-5))
    nodes = [node.args[i] if len(node.args) > i else node.kwargs.get(n) for i, n in ((2, "weight"), (3, "bias"))]
    with torch.no_grad():
        for name, operand in zip(("weight", "bias"), nodes, strict=True):
            value = _parameter(b, operand)
            if value is not None:
                getattr(layer, name).copy_(value)
    return b.call(node, layer.eval(), b.tensor(node, 0), name=_owner(b, nodes[0]))


def _softmax(b: Builder, node: fx.Node) -> fx.Node:
    dim = b.argument(node, 1, "dim")
    if dim is None:
        raise b.unsupported(node, "softmax() without dim")
    return b.call(node, nn.Softmax(int(dim)), b.tensor(node, 0))


_add = _binary(m.Add, lambda c, _: m.Scale(1.0, c))


_sub = _binary(m.Sub, lambda c, swapped: m.Scale(-1.0, c) if swapped else m.Scale(1.0, -c))


_mul = _binary(m.Mul, lambda c, _: m.Scale(c))


def _div(b: Builder, node: fx.Node) -> fx.Node:
    if node.kwargs.get("rounding_mode") is not None:
        raise b.unsupported(node, "division with a rounding mode")
    number = _number(b, node, _operand(node, 1, "other"))
    if number is None:
        raise b.unsupported(node, "division by a tensor")
    return b.call(node, m.Scale(1.0 / number), b.tensor(node, 0))


def _clamp(b: Builder, node: fx.Node) -> fx.Node:
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

CONVERSIONS = Conversions(FUNCTIONS, METHODS, MODULES)
