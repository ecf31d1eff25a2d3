"""ONNX models that are well-formed and impossible, or would take for ever."""

# ruff: noqa: E501 (tables)

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = [helper.make_opsetid("", 21)]


def quantized(
    nodes: list[Any] | None = None,
    *,
    shape: tuple[Any, ...] = (1, 4),
    weight: tuple[int, ...] = (4, 2),
    scale: Any = 0.5,
    kind: int = TensorProto.FLOAT,
    tensors: list[TensorProto] | None = None,
    **more: Any,
) -> onnx.ModelProto:
    """x -> Q -> DQ -> MatMul(w -> DQ) -> y, and changes."""
    own = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    known = [
        numpy_helper.from_array(np.array(scale, np.float32), "s"),
        numpy_helper.from_array(np.array(0, np.int8), "z"),
        numpy_helper.from_array(np.ones(weight, np.int8), "w"),
    ]
    names = {tensor.name for tensor in tensors or []}
    graph = helper.make_graph(
        own if nodes is None else nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [t for t in known if t.name not in names] + (tensors or []),
    )
    return helper.make_model(graph, **{"opset_imports": OPSET, "ir_version": 10, **more})


def raw(name: str, dims: list[int], kind: int = TensorProto.INT8, content: bytes = b"\1") -> TensorProto:
    """A tensor whose content need not fit its shape."""
    tensor = TensorProto(name=name, data_type=kind, raw_data=content)
    tensor.dims.extend(dims)
    return tensor


def external(name: str, location: str, **entries: str) -> TensorProto:
    """A tensor whose values are said to lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.INT8, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend([4, 2])
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def tail(*nodes: Any) -> list[Any]:
    """The good nodes, their result going through further ones."""
    own = list(quantized().graph.node)
    own[-1].output[0] = "m"
    return [*own, *nodes]


def nested(depth: int, wide: int = 2) -> onnx.ModelProto:
    """Functions that call functions: `wide` to the power of `depth` nodes."""
    functions = []
    for level in range(depth):
        inner = f"f{level + 1}" if level + 1 < depth else "Relu"
        domain = "d" if level + 1 < depth else ""
        names = ["a", *(f"t{i}" for i in range(wide - 1)), "b"]
        nodes = [helper.make_node(inner, [one], [other], domain=domain) for one, other in pairwise(names)]
        functions.append(
            helper.make_function("d", f"f{level}", ["a"], ["b"], nodes, [*OPSET, helper.make_opsetid("d", 1)])
        )
    nodes = tail(helper.make_node("f0", ["m"], ["y"], domain="d"))
    return quantized(nodes, opset_imports=[*OPSET, helper.make_opsetid("d", 1)], functions=functions)


def recursive() -> onnx.ModelProto:
    """A function that calls itself."""
    body = [helper.make_node("f", ["a"], ["b"], domain="d")]
    function = helper.make_function("d", "f", ["a"], ["b"], body, [*OPSET, helper.make_opsetid("d", 1)])
    nodes = tail(helper.make_node("f", ["m"], ["y"], domain="d"))
    return quantized(nodes, opset_imports=[*OPSET, helper.make_opsetid("d", 1)], functions=[function])


def branches(depth: int) -> onnx.ModelProto:
    """If inside If."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["m"], ["r"])], "g", [], [helper.make_tensor_value_info("r", 1, None)]
    )
    for level in range(depth):
        node = helper.make_node("If", ["c"], [f"r{level}"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info(f"r{level}", 1, None)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph)
    return quantized(tail(node), tensors=[numpy_helper.from_array(np.array(True), "c")])


def _constant(name: str, values: Any, kind: Any = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(values, kind), name)


def _one(op: str, values: Any, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(op, ["m", "k"], ["y"], **attributes)
    return quantized(tail(node), tensors=[_constant("k", values)])


def _alone(op: str, **attributes: Any) -> onnx.ModelProto:
    return quantized(tail(helper.make_node(op, ["m"], ["y"], **attributes)))


def models() -> dict[str, Callable[[], onnx.ModelProto]]:
    """By name, what makes each."""
    big = 1 << 40
    return {
        **{f"functions {d} deep": partial(nested, d) for d in (3, 12, 22, 60)},
        "function of itself": recursive,
        **{f"branches {d} deep": partial(branches, d) for d in (1, 8, 15)},
        "input of terabytes": lambda: quantized(shape=(1, big)),
        "input of gigabytes": lambda: quantized(shape=(1, 1 << 31)),
        "input of 2^60": lambda: quantized(shape=(1 << 30, 1 << 30)),
        "negative input": lambda: quantized(shape=(1, -4)),
        "empty input": lambda: quantized(shape=(1, 0)),
        "scalar input": lambda: quantized(shape=()),
        "input of 300 dimensions": lambda: quantized(shape=(1,) * 300),
        "named dimensions": lambda: quantized(shape=("a", "b")),
        **{f"input of type {k}": partial(quantized, kind=k) for k in (0, 7, 8, 9, 10, 11, 14, 16, 17, 23, 999)},
        **{f"weight of type {k}": lambda k=k: quantized(tensors=[raw("w", [4, 2], k)]) for k in (0, 1, 8, 21, 23, 99)},
        "weight of terabytes": lambda: quantized(tensors=[raw("w", [big, 2])]),
        "weight that overflows": lambda: quantized(tensors=[raw("w", [1 << 62, 4])]),
        "weight of negative size": lambda: quantized(tensors=[raw("w", [-4, 2])]),
        "weight that is short": lambda: quantized(tensors=[raw("w", [4, 2])]),
        "weight that is empty": lambda: quantized(tensors=[raw("w", [0, 2], content=b"")]),
        **{
            f"scale {s!r}": partial(quantized, scale=s)
            for s in (0, -1, float("nan"), float("inf"), 1e-45, 3e38, [], [0.5, 0.5, 0.5], [[0.5]], [0.5] * 4)
        },
        "external, missing": lambda: quantized(tensors=[external("w", "nowhere")]),
        "external, secret": lambda: quantized(tensors=[external("w", "../secret")]),
        "external, absolute": lambda: quantized(tensors=[external("w", "/etc/passwd")]),
        "external, device": lambda: quantized(tensors=[external("w", "/dev/zero")]),
        "external, itself": lambda: quantized(tensors=[external("w", "bad.onnx", offset="0", length="8")]),
        "external, short": lambda: quantized(tensors=[external("w", "bad.onnx", offset="0", length="3")]),
        "external, negative": lambda: quantized(tensors=[external("w", "bad.onnx", offset="-5", length="8")]),
        "external, huge": lambda: quantized(tensors=[external("w", "bad.onnx", offset="0", length=str(big))]),
        "external, no number": lambda: quantized(tensors=[external("w", "bad.onnx", offset="x")]),
        "external, no place": lambda: quantized(tensors=[external("w", "")]),
        "pad by terabytes": lambda: _one("Pad", [0, 0, 0, big]),
        "pad to negative": lambda: _one("Pad", [0, -5, 0, -5]),
        "expand to terabytes": lambda: _one("Expand", [big, 2]),
        "tile to terabytes": lambda: _one("Tile", [1, big]),
        "reshape to zero": lambda: _one("Reshape", [0, 0, 0]),
        "reshape to -1, -1": lambda: _one("Reshape", [-1, -1]),
        "reshape to nothing": lambda: _one("Reshape", []),
        "gather far away": lambda: _one("Gather", [big]),
        "gather of a gigabyte": lambda: _one("Gather", np.zeros(1 << 20, np.int64)),
        "unsqueeze far": lambda: _one("Unsqueeze", [99]),
        "split of nothing": lambda: quantized(tail(helper.make_node("Split", ["m"], ["y"], num_outputs=1))),
        "transpose of three": lambda: _alone("Transpose", perm=[0, 1, 2]),
        "transpose twice": lambda: _alone("Transpose", perm=[0, 0]),
        "flatten far": lambda: _alone("Flatten", axis=99),
        "softmax far": lambda: _alone("Softmax", axis=99),
        "max-pool of a line": lambda: _alone("MaxPool", kernel_shape=[1 << 30]),
        "unknown operation": lambda: _alone("Nothing"),
        "unknown attribute": lambda: _alone("Relu", nothing=3),
        "unknown domain": lambda: quantized(
            tail(helper.make_node("Relu", ["m"], ["y"], domain="com.example")),
            opset_imports=[*OPSET, helper.make_opsetid("com.example", 1)],
        ),
        "domain without opset": lambda: quantized(tail(helper.make_node("Relu", ["m"], ["y"], domain="x.y"))),
        "no opset": lambda: quantized(opset_imports=[]),
        "opset of the future": lambda: quantized(opset_imports=[helper.make_opsetid("", 9999)]),
        "opset 1": lambda: quantized(opset_imports=[helper.make_opsetid("", 1)]),
        "ir of the future": lambda: quantized(ir_version=9999),
        "no nodes": lambda: quantized([]),
        "a circle": lambda: quantized(tail(helper.make_node("Relu", ["y"], ["y"]))),
        "a name twice": lambda: quantized(tail(helper.make_node("Relu", ["m"], ["m"]), helper.make_node("Relu", ["m"], ["y"]))),
        "an input that is nowhere": lambda: quantized(tail(helper.make_node("Add", ["m", "nowhere"], ["y"]))),
        "an empty name": lambda: quantized(tail(helper.make_node("Relu", [""], ["y"]))),
        "strings": lambda: quantized(tensors=[helper.make_tensor("w", TensorProto.STRING, [1], [b"x"])]),
        "ten thousand nodes": lambda: quantized(
            tail(
                *(helper.make_node("Relu", ["m" if i == 0 else f"r{i - 1}"], [f"r{i}"]) for i in range(10000)),
                helper.make_node("Relu", ["r9999"], ["y"]),
            )
        ),
        "names from elsewhere": lambda: quantized(tail(helper.make_node("Relu", ["m"], ["y"], name='"*/ <script>\n??/'))),
    }  # fmt: skip


def every() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(name, what writes the file)."""
    for name, make in models().items():
        yield name, partial(_write, make)
    yield "no file", lambda path: None
    yield "an empty file", lambda path: path.touch()
    yield "a folder", lambda path: path.mkdir()
    yield "a pipe", lambda path: __import__("os").mkfifo(path)
    yield "a device", lambda path: path.symlink_to("/dev/zero")
    yield "a link to itself", lambda path: path.symlink_to(path.name)
    yield "text", lambda path: path.write_text("ir_version: 8") and None
    yield "a long tag", lambda path: path.write_bytes(b"\x3a\xff\xff\xff\xff\x0f" * 99) and None
    yield "groups", lambda path: path.write_bytes(b"\x0b" * 100000) and None
    yield "graphs in graphs", lambda path: path.write_bytes(_groups()) and None


def _groups() -> bytes:
    content = b""
    for _ in range(200):  # ModelProto.graph.node.attribute.g and so on, each as long as what is in it
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            content = tag + _varint(len(content)) + content
    return b"\x3a" + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _write(make: Callable[[], onnx.ModelProto], path: Path) -> None:
    path.write_bytes(make().SerializeToString())
