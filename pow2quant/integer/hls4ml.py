"""hls4ml: a program in integers as a project of fixed-point layers, whose C simulation g++ compiles.

Every tensor is an `ap_fixed` whose last bit is its scale, which rounds half to even (`AP_RND_CONV`) and saturates;
sums of products are as wide as they need to be. Maps have their channels last.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.integer.lower import lower
from pow2quant.integer.ops.average import Average
from pow2quant.integer.ops.convolution import Convolution
from pow2quant.integer.ops.dense import Dense
from pow2quant.integer.ops.maximum import Maximum
from pow2quant.integer.ops.sum import Sum
from pow2quant.integer.ops.view import View
from pow2quant.saving import staged
from pow2quant.targets import of as target_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.integer.nodes import Window
    from pow2quant.integer.program import Ints, Program, Requantization, Tensor

    Order = NDArray[np.intp]
    """Where each of a tensor's values in hls4ml, in its memory, stands in the program's."""

PROJECT, BUILD, SCRIPT = "network", "build_lib.sh", "compare.py"


def export_hls4ml(artifact: Artifact, folder: Path) -> Path:
    """A project for hls4ml's Vitis backend in `folder`: sources, `build_lib.sh`, `compare.py`. Returns the folder.

    Raises what `lower` raises; MissingExtraError without hls4ml; UnsupportedModelError, naming the node, for what is
    not written.
    """
    target = target_of(artifact.model)
    if target.rounding_matters:
        raise UnsupportedModelError(f"target {target.name} does not round half to even, as AP_RND_CONV does")
    layers = Layers(lower(artifact))
    with staged(folder, BUILD) as staging:
        layers.write(staging)
        template = files("pow2quant.integer") / "templates" / "compare.py.j2"
        (staging / SCRIPT).write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


class Layers:
    """A program as hls4ml's list of layers.

    outputs: tensors to give in place of the network's outputs. Of every tensor, names: its layer; shapes: the layer's,
    without the batch and channels first; orders: of its values in hls4ml.
    """

    def __init__(self, program: Program, outputs: Sequence[str] | None = None) -> None:
        self.program = program
        self.outputs = list(program.outputs if outputs is None else outputs)
        self.names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.orders: dict[str, Order] = {}
        self.layers: list[dict[str, Any]] = []
        self.precisions: dict[str, Any] = {}
        for name in program.inputs:
            tensor = program.tensors[name]
            self.shapes[name], self.orders[name] = tensor.shape, _channels_last(tensor.shape)
            self.names[name] = self.add("InputLayer", [], {"result": fixed(tensor)}, input_shape=_shape(tensor.shape))
        for step in program.steps:
            writer = WRITERS.get(type(step))
            if writer is None:
                raise step.refused(f"{type(step).__name__.lower()} is not written to hls4ml")
            writer(self, step)
        self.ends = [self.names[name] if outputs is None else self.copy(name) for name in self.outputs]

    def write(self, folder: Path) -> None:
        """The project's files."""
        try:
            hls4ml: Any = import_module("hls4ml")
        except ImportError as error:
            raise MissingExtraError(f"hls4ml is not installed: pip install 'pow2quant[hls4ml]' ({error})") from error
        options = {"backend": "Vitis", "write_weights_txt": False}
        config = hls4ml.utils.config.create_config(output_dir=str(folder), project_name=PROJECT, **options)
        wide = {"Precision": {"default": "ap_fixed<32,16>"}, "ReuseFactor": 1, "Strategy": "Latency"}
        config["HLSConfig"] = {"Model": wide, "LayerName": {n: {"Precision": p} for n, p in self.precisions.items()}}
        starts = [layer["name"] for layer in self.layers if layer["class_name"] == "InputLayer"]
        with contextlib.redirect_stdout(io.StringIO()):
            model = hls4ml.model.ModelGraph.from_layer_list(config, self.layers, starts, self.ends)
            model.config.config["Stamp"] = PROJECT
            model.write()

    def add(self, kind: str, inputs: list[str], precision: dict[str, str], **attributes: Any) -> str:
        """A layer; the name that it gets. precision: types by what has them: result, accum, weight, bias."""
        name = f"layer{len(self.layers)}"
        self.layers.append({"class_name": kind, "name": name, "inputs": inputs, **attributes})
        self.precisions[name] = precision
        return name

    def put(
        self, step: Any, kind: str, inputs: list[str], precision: dict[str, str], shape: tuple[int, ...], **rest: Any
    ) -> None:
        """The layer of a step, and the ReLU that is fused into it. shape: of its result, a map or a row."""
        result = self.program.tensors[step.output]
        name = self.add(kind, inputs, {**precision, "result": fixed(result)}, **rest)
        rule: Requantization | None = step.rule
        if rule is not None and (rule.low, rule.high) != (result.low, result.high):
            activations = {(0, result.high): "relu", (0, math.ldexp(6, -result.exponent)): "relu6"}
            if (rule.low, rule.high) not in activations:
                raise step.refused(f"clips codes to {rule.low} to {rule.high}; hls4ml has ReLU and ReLU6")
            kind = activations[rule.low, rule.high]
            name = self.add("Activation", [name], {"result": fixed(result)}, activation=kind, n_in=result.size)
        self.names[step.output] = name
        self.shapes[step.output], self.orders[step.output] = shape, _channels_last(shape)

    def copy(self, name: str) -> str:
        """A tensor's layer for output alone; it is wider, as equal types would be joined."""
        tensor = self.program.tensors[name]
        wider = _type(tensor.encoding.grid.width + 1, tensor.exponent)
        return self.add("Activation", [self.names[name]], {"result": wider}, activation="linear", n_in=tensor.size)

    def shaped(self, name: str, shape: tuple[int, ...]) -> str:
        """A tensor's layer in a shape, channels first as in the program; its values stay where they are."""
        if self.shapes[name] == shape:
            return self.names[name]
        precision = {"result": fixed(self.program.tensors[name])}
        return self.add("Reshape", [self.names[name]], precision, target_shape=_shape(shape))


def fixed(tensor: Tensor) -> str:
    """The type whose values are a tensor's."""
    if tensor.zero:
        raise UnsupportedModelError(f"{tensor.name}: a zero point; hls4ml has none (--target qonnx)")
    grid = tensor.encoding.grid
    saturation = "AP_SAT_SYM" if grid.signed and tensor.low == -tensor.high else "AP_SAT"
    return _type(tensor.encoding.grid.width, tensor.exponent, grid.signed, saturation)


def _type(width: int, exponent: int, signed: bool = True, saturation: str = "AP_SAT") -> str:
    return f"ap_{'' if signed else 'u'}fixed<{width},{width + exponent},AP_RND_CONV,{saturation}>"


def _held(values: Ints, exponent: int) -> str:
    """The type of signed integers that count in 2^exponent."""
    return _type(int(np.abs(values).max(initial=1)).bit_length() + 1, exponent)


def _products(layers: Layers, step: Any) -> tuple[dict[str, str], NDArray[np.float64], NDArray[np.float64]]:
    """The types of a layer's sums, weights and biases, and the real weights (O, …) and biases (O,)."""
    rule, x = step.requantization, layers.program.tensors[step.inputs[0]]
    result = layers.program.tensors[step.output]
    exponents = np.broadcast_to(result.exponent - rule.shift - x.exponent, len(step.weight)).astype(int)
    least = int(exponents.min())
    units = np.left_shift(1, exponents - least)
    weight, bias = step.weight * units.reshape(-1, *[1] * (step.weight.ndim - 1)), step.bias * units
    width = (step.bound(layers.program) * int(units.max())).bit_length() + 2
    types = {
        "weight": _held(weight, least),
        "bias": _held(bias, least + x.exponent),
        "accum": _type(width, least + x.exponent),
    }
    return types, np.ldexp(weight.astype(float), least), np.ldexp(bias.astype(float), least + x.exponent)


def _dense(layers: Layers, step: Dense) -> None:
    name = step.inputs[0]
    if layers.program.tensors[name].size != step.weight.shape[1]:
        raise step.refused("a linear layer over the last of several dimensions")
    types, weight, bias = _products(layers, step)
    row = layers.shaped(name, (layers.program.tensors[name].size,))
    data = {"weight_data": weight[:, layers.orders[name]].T.copy(), "bias_data": bias}
    sizes = {"n_in": weight.shape[1], "n_out": len(weight)}
    layers.put(step, "Dense", [row], types, (len(weight),), **sizes, **data)


def _convolution(layers: Layers, step: Convolution) -> None:
    types, weight, bias = _products(layers, step)
    outputs, channels = weight.shape[:2]
    depthwise = step.groups != 1
    if depthwise and (channels, outputs) != (1, step.groups):
        raise step.refused("a grouped convolution; hls4ml has depthwise ones")
    kernel = weight.transpose(2, 3, 0, 1) if depthwise else weight.transpose(2, 3, 1, 0)
    _windowed(layers, step, types, kernel, bias, depthwise)


def _average(layers: Layers, step: Average) -> None:
    """A mean over 2^n values: a depthwise convolution whose weights are 2^-n."""
    x, count = layers.program.tensors[step.inputs[0]], int(step.counts.max())
    if count != int(step.counts.min()) or count & (count - 1):
        raise step.refused("a mean that is not over 2^n values everywhere")
    log, channels = count.bit_length() - 1, x.size // math.prod(step.window.size)
    types = {
        "weight": _type(2, -log),
        "bias": _type(2, 0),
        "accum": _type(step.bound(layers.program).bit_length() + 2, x.exponent - log),
    }
    kernel = np.full((*step.window.kernel, channels, 1), 1 / count)
    _windowed(layers, step, types, kernel, np.zeros(channels), depthwise=True)


def _maximum(layers: Layers, step: Maximum) -> None:
    if any(p > 0 for p in (*step.window.before, *step.window.after)):
        raise step.refused("a maximum with padding")
    x = layers.program.tensors[step.inputs[0]]
    channels = x.size // math.prod(step.window.size)
    pool = dict(zip(("pool_height", "pool_width"), step.window.kernel, strict=True))
    types, shape, inputs = {"accum": fixed(x)}, (channels, *step.window.result), [_map(layers, step, channels)]
    layers.put(step, "MaxPooling2D", inputs, types, shape, n_filt=channels, **pool, **_places(step.window))


def _windowed(
    layers: Layers,
    step: Any,
    types: dict[str, str],
    kernel: NDArray[np.float64],
    bias: NDArray[np.float64],
    depthwise: bool,
) -> None:
    """kernel: (height, width, inputs, outputs), of a depthwise convolution (height, width, channels, 1)."""
    if step.window.dilations != (1, 1) and step.window.kernel != (1, 1):
        raise step.refused("a dilated convolution")
    inputs = [_map(layers, step, kernel.shape[2])]
    kind, key = ("DepthwiseConv2D", "depthwise_data") if depthwise else ("Conv2D", "weight_data")
    sizes = {"n_chan": kernel.shape[2], "n_filt": len(bias)}
    filters = dict(zip(("filt_height", "filt_width"), step.window.kernel, strict=True))
    data = {key: kernel.copy(), "bias_data": bias}
    layers.put(
        step, kind, inputs, types, (len(bias), *step.window.result), **sizes, **filters, **data, **_places(step.window)
    )


def _map(layers: Layers, step: Any, channels: int) -> str:
    """The input in the shape (height, width, channels), in which its values have to lie already."""
    name = step.inputs[0]
    if not np.array_equal(layers.orders[name], _channels_last((channels, *step.window.size))):
        raise step.refused("reads a map that was reshaped")
    return layers.shaped(name, (channels, *step.window.size))


def _places(window: Window) -> dict[str, Any]:
    found: dict[str, Any] = {"data_format": "channels_last"}
    for key, (height, width) in {"in": window.size, "out": window.result, "stride": window.strides}.items():
        found |= {f"{key}_height": height, f"{key}_width": width}
    (top, left), (bottom, right) = window.before, (max(0, after) for after in window.after)
    return {**found, "pad_top": top, "pad_left": left, "pad_bottom": bottom, "pad_right": right}


def _sum(layers: Layers, step: Sum) -> None:
    a, b = (layers.program.tensors[name] for name in step.inputs)
    if a.constant is not None or b.constant is not None or a.shape != b.shape:
        raise step.refused("a sum with a constant, or of two shapes")
    shape = layers.shapes[step.inputs[0]]
    if not all(np.array_equal(layers.orders[name], _channels_last(shape)) for name in step.inputs):
        raise step.refused("a sum of what was reshaped")
    inputs = [layers.shaped(name, shape) for name in step.inputs]
    layers.put(step, "Merge", inputs, {}, shape, op="subtract" if step.subtracts else "add")


def _view(layers: Layers, step: View) -> None:
    source = step.inputs[0]
    layers.names[step.output] = layers.names[source]
    layers.shapes[step.output], layers.orders[step.output] = layers.shapes[source], layers.orders[source]


def _shape(shape: tuple[int, ...]) -> list[int]:
    return [*shape[1:], shape[0]]


def _channels_last(shape: tuple[int, ...]) -> Order:
    return np.moveaxis(np.arange(math.prod(shape)).reshape(shape), 0, -1).reshape(-1)


WRITERS: dict[type, Callable[[Layers, Any], None]] = {
    Average: _average,
    Convolution: _convolution,
    Dense: _dense,
    Maximum: _maximum,
    Sum: _sum,
    View: _view,
}
