"""A drop-in for AIMET's `QuantizationSimModel`: its constructor and methods, every scale a power of two.

    from pow2quant import QuantizationSimModel

    sim = QuantizationSimModel(model, dummy_input, default_param_bw=8, backend="custom")
    sim.compute_encodings(lambda model: model(images))
    sim.onnx.export(dummy_input, "model.onnx", encoding_version="2.0.0")

What differs from aimet-torch 2.42, and why: `sim.model` is the prepared copy of the network, batch norm folded, with
one quantizer per tensor; biases are simulated as int32 on the lattice s_in * s_w, so their encodings always follow from
the other scales and are not loaded or frozen; without a `quant_scheme`, scales are those of least squared error, which
at 2^k costs far less accuracy than the extremes. What AIMET would do silently wrong raises an error.

`Adaround`, `QuantAnalyzer` (of this module) are AIMET's with the constraint in force; its cross-layer equalization and
batch norm re-estimation work on the float network, its SeqMSE and mixed precision on a simulation of `backend="aimet"`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, version_converter

from pow2quant import foreign
from pow2quant.adapters import aimet_config, aimet_encodings, onnx_qdq
from pow2quant.adapters.aimet_members import MEMBERS
from pow2quant.artifact import Artifact, Site, Table
from pow2quant.backends.base import ALL, Batch, Simulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.backends.placement import Placement, place, tensor_name
from pow2quant.config import WIDTHS, QuantPlan, TensorSpec
from pow2quant.errors import (
    ConfigError,
    EncodingError,
    FileFormatError,
    NotCalibratedError,
    NotPowerOfTwoError,
)
from pow2quant.frontends.operators import operator, weight_axis
from pow2quant.frontends.prepare import prepare
from pow2quant.frontends.writing import Node, OnnxGraph
from pow2quant.operators import Kind
from pow2quant.pow2_constraints import Encoding, Format, Observed, choose
from pow2quant.runs import simulation_of
from pow2quant.saving import write

if TYPE_CHECKING:
    import os

    from torch import Tensor, fx, nn


class QuantScheme(Enum):
    """AIMET's schemes, for scripts without AIMET; its own enumeration and its names are understood too."""

    min_max = 1
    post_training_tf = min_max
    post_training_tf_enhanced = 2
    training_range_learning_with_tf_init = 3
    training_range_learning_with_tf_enhanced_init = 4
    post_training_percentile = 6


RANGES = {
    "min_max": "minmax",
    "tf": "minmax",
    "post_training_tf": "minmax",
    "training_range_learning_with_tf_init": "minmax",
    "tf_enhanced": "mse",
    "post_training_tf_enhanced": "mse",
    "training_range_learning_with_tf_enhanced_init": "mse",
    "percentile": "percentile",
    "post_training_percentile": "percentile",
}
"""AIMET's quantization schemes and our choosers."""

PLACEMENTS = ("pow2quant", "aimet")
"""Where quantizers may stand: ours, one per tensor, or AIMET's."""

_UNSET: Any = object()


def __getattr__(name: str) -> Any:
    """AIMET's own classes, constrained: `Adaround`, `QuantAnalyzer`. Raises MissingExtraError without AIMET."""
    if name in ("Adaround", "AdaroundParameters", "QuantAnalyzer"):
        from pow2quant.backends.aimet.constrained import tools

        return tools()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class QuantizationSimModel:
    """Simulates a quantized network with AIMET's interface (see the module).

    model: left unchanged. dummy_input: inputs of one call, (N, …) each. quant_scheme: AIMET's, or its name; None takes
    the encodings of least squared error. default_output_bw, default_param_bw: 2 to 16; from 32 on, or with a
    `default_data_type` of float and 32 bits, these tensors stay float. config_file: with `aimet` AIMET's files and
    aliases, with `custom` the part that has a meaning here (`adapters.aimet_config`). placement: where quantizers
    stand, "pow2quant" (one per tensor of the prepared network) or "aimet": then this is an object of AIMET's own class,
    around the network as it is, quantizers where AIMET puts them; only scales differ. It needs `backend="aimet"`.
    Raises UnsupportedModelError, WeightsError and ModelError as `prepare` does, ConfigError for impossible arguments.
    """

    def __new__(
        cls, *args: Any, backend: str = "custom", placement: str = "pow2quant", **kwargs: Any
    ) -> QuantizationSimModel:
        """A simulation on `aimet` also has what AIMET's own class has; with AIMET's placement it is of that class."""
        if placement not in PLACEMENTS:
            raise ConfigError(f"placement: {placement!r} is not one of {', '.join(PLACEMENTS)}")
        if placement == "aimet":
            if backend != "aimet":
                raise ConfigError('placement: AIMET\'s own places need backend="aimet"')
            from pow2quant.backends.aimet.constrained import tools

            own: QuantizationSimModel = tools()["QuantizationSimModel"](*args, **kwargs)
            return own
        return super().__new__(_OnAimet if cls is QuantizationSimModel and backend == "aimet" else cls)

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Tensor | Sequence[Tensor],
        quant_scheme: Any = None,
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        in_place: bool = False,
        config_file: str | None = None,
        default_data_type: Any = "int",
        *,
        rounding_mode: str = "nearest",
        backend: str = "custom",
        placement: str = "pow2quant",
    ) -> None:
        if in_place:
            raise ConfigError("in_place: the network is always prepared as a copy; train and run sim.model")
        if rounding_mode != "nearest":
            raise ConfigError(f"rounding_mode: {rounding_mode!r} is not 'nearest' (half to even)")
        device = next((p.device for p in model.parameters()), "cpu")
        example: Batch = tuple(dummy_input) if isinstance(dummy_input, (tuple, list)) else dummy_input  # type: ignore[assignment]
        self.quant_scheme = QuantScheme.post_training_tf_enhanced if quant_scheme is None else quant_scheme
        bits = {"default_output_bw": default_output_bw, "default_param_bw": default_param_bw}
        self._network = fold_batch_norm(prepare(model, example))
        plan = _plan(_range(self.quant_scheme), bits, getattr(default_data_type, "name", default_data_type))
        plan = self._configured(plan, example, config_file, bits) if config_file else plan
        self._placement: Placement = place(self._network, plan)
        self._fixed: frozenset[str] = frozenset()
        self.simulation: Simulation = simulation_of(self._network, example, plan, backend)
        self.simulation.model.to(device)
        self.simulation.model.register_forward_pre_hook(_refuse_without_encodings)

    def __getattr__(self, name: str) -> Any:
        if name in MEMBERS:
            raise AttributeError(f"{name}: {MEMBERS[name].custom}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def model(self) -> nn.Module:
        """The network that computes with fake-quantized values; run and train this one."""
        return self.simulation.model

    def compute_encodings(
        self, forward_pass_callback: Callable[..., Any], forward_pass_callback_args: Any = _UNSET
    ) -> None:
        """Chooses all encodings that are not frozen, from what flows through `sim.model` during the callback.

        It is called with the model (in eval mode, without gradients), and with the second argument if there is one.
        Activations are observed unquantized. Raises DataError when nothing was observed, or NaN or infinity;
        WeightsError when weights are not finite. Then the encodings are what they were.
        """
        given = () if forward_pass_callback_args is _UNSET else (forward_pass_callback_args,)

        def while_observing() -> Iterator[Batch]:
            forward_pass_callback(self.model, *given)
            yield from ()

        before, fixed = self.simulation.encodings(), self._frozen()
        roles = {s.role for s in self._placement.sites if s.name not in fixed} | {"bias"}
        held = {name: e for name, e in before.items() if name in fixed}
        try:
            with _in_eval_mode(self.model):
                table = self.simulation.calibrate(while_observing(), ALL & roles)
            if not held.items() <= table.items():
                self.simulation.load(table | held)
                self._derive_biases()
        except BaseException:
            self.simulation.load(before)
            raise

    def load_encodings(
        self,
        encodings: Mapping[str, Any] | str | os.PathLike[str],
        strict: bool = True,
        partial: bool = True,
        requires_grad: bool | None = None,
        allow_overwrite: bool | None = True,
        *,
        model: ModelProto | str | os.PathLike[str] | None = None,
        snap: bool = False,
    ) -> None:
        """Takes encodings from a file or its content: versions 0.6.1, 1.0.0, 2.0.0, named after torch or ONNX.

        strict: an entry that fits no quantizer is an error, otherwise it is left out. partial: quantizers without an
        entry keep what they have, otherwise they stay float until `compute_encodings`. requires_grad, allow_overwrite:
        as AIMET has them (None: unchanged). model: the ONNX file that the tensors' names are from; without one, the
        file beside `encodings` that is called alike. snap: free scales become the smallest powers of two that cover
        their range.
        Biases follow from the others. Raises FileFormatError, EncodingError naming the tensor that does not fit,
        NotPowerOfTwoError naming the one whose scale is free.
        """
        self._load(encodings, ALL, strict, partial, requires_grad, allow_overwrite, model, snap)

    def set_and_freeze_param_encodings(self, encoding_path: str | os.PathLike[str], *, snap: bool = False) -> None:
        """Takes the weights' encodings of a file (of `save_encodings_to_json`, `export`, AdaRound) for good.

        Afterwards `compute_encodings` leaves them, and the weights, bit-identical.
        """
        self._load(encoding_path, {"weight"}, True, True, False, False, None, snap)

    def save_encodings_to_json(self, path: str | os.PathLike[str], filename_prefix: str) -> None:
        """Writes `<path>/<filename_prefix>.json`: the encodings named after the modules, as AIMET does (0.6.1)."""
        write(Path(path) / f"{filename_prefix}.json", self._torch_named().encode())

    @property
    def onnx(self) -> _OnnxExporter:
        """`sim.onnx.export(args, f, …)`: float ONNX and encodings."""
        return _OnnxExporter(self)

    def export(
        self,
        path: str | os.PathLike[str],
        filename_prefix: str,
        dummy_input: Tensor | Sequence[Tensor],
        onnx_export_args: Mapping[str, Any] | None = None,
        *,
        export_model: bool = True,
        filename_prefix_encodings: str | None = None,
        encoding_version: str = "1.0.0",
        **others: Any,
    ) -> None:
        """Writes `<prefix>.onnx` (float, weights on their grids), `<prefix>.encodings` and `<prefix>_torch.encodings`.

        onnx_export_args: `input_names`, `output_names` and `opset_version`; AIMET's other options, in `others`, only
        with their defaults. Raises ConfigError for an option that has no meaning here, OutputError.
        """
        defaults = {"propagate_encodings": False, "export_to_torchscript": False, "use_embedded_encodings": False}
        for key, value in others.items():
            if value is not (defaults | {"apply_param_qdq": True}).get(key, _UNSET):
                raise ConfigError(f"export: {key}={value!r} is not supported")
        arguments = dict(onnx_export_args or {})
        stem = Path(path) / (filename_prefix_encodings or filename_prefix)
        artifact = _renamed(self._artifact(dummy_input), arguments)
        if export_model:
            onnx_qdq.save(artifact.model, Path(path) / f"{filename_prefix}.onnx")
        _write_encodings(artifact, stem.with_name(f"{stem.name}.encodings"), encoding_version)
        write(stem.with_name(f"{stem.name}_torch.encodings"), self._torch_named().encode())

    # -- what the aimet backend does differently ---------------------------------------------------------------------

    def _configured(self, plan: QuantPlan, example: Batch, config_file: str, bits: dict[str, int]) -> QuantPlan:
        if config_file == "default":  # what AIMET means by it is our default
            return plan
        (end,) = [n for n in self._network.graph.nodes if n.op == "output"]
        outputs = {str(n.target) for n in end.all_input_nodes}
        return aimet_config.plan(Path(config_file), plan, _onnx_types(self._network), outputs)

    def _frozen(self) -> frozenset[str]:
        return self._fixed

    def _mark(self, names: Collection[str], requires_grad: bool | None, allow_overwrite: bool | None) -> None:
        if requires_grad:
            raise ConfigError('requires_grad: only backend="aimet" trains encodings')
        if allow_overwrite is not None:
            self._fixed = self._fixed - set(names) if allow_overwrite else self._fixed | set(names)

    # ----------------------------------------------------------------------------------------------------------------

    def _load(
        self,
        encodings: Mapping[str, Any] | str | os.PathLike[str],
        roles: Collection[str],
        strict: bool,
        partial: bool,
        requires_grad: bool | None,
        allow_overwrite: bool | None,
        model: ModelProto | str | os.PathLike[str] | None,
        snap: bool,
    ) -> None:
        document, source = _document(encodings)
        axes = {y.weight.name: _axis(self._network, y.module) for y in self._placement.layers if y.weight is not None}
        table = aimet_encodings.loads(json.dumps(document), source=source, axes=axes)
        found = self._by_site(table, roles, strict, source, lambda: _onnx_model(model, encodings))
        self._mark((), requires_grad, allow_overwrite)
        fitted = {
            site.name: self._fitted(name, encoding, site, snap)
            for site, (name, encoding) in found.items()
            if site.name not in self._frozen()
        }
        self.simulation.load((self.simulation.encodings() if partial else {}) | fitted)
        self._derive_biases()
        self._mark(fitted, requires_grad, allow_overwrite)

    def _by_site(
        self,
        table: Table,
        roles: Collection[str],
        strict: bool,
        source: str,
        model: Callable[[], ModelProto | None],
    ) -> dict[Site, tuple[str, Encoding]]:
        """The file's name and encoding for every site. A tensor's own entry counts more than one that passes it on."""
        places = _torch_places(self._network, self._placement)
        biases = {f"{y.module}.bias" for y in self._placement.layers}
        unknown = table.keys() - places.keys() - biases
        onnx_model = model() if unknown else None
        if onnx_model is not None:
            places |= _onnx_places(self._network, self._placement, onnx_model)
        found: dict[Site, tuple[int, str, Encoding]] = {}
        for name, encoding in table.items():
            site, distance = places.get(name, (None, 0))
            if site is None and name not in biases and strict and roles == ALL:
                raise EncodingError(f"{source}: {name}: the simulation has no quantizer for this tensor (strict=True)")
            if site is not None and site.role in roles and (site not in found or distance < found[site][0]):
                found[site] = (distance, name, encoding)
        return {site: (name, encoding) for site, (_, name, encoding) in found.items()}

    def _fitted(self, name: str, encoding: Encoding, site: Site, snap: bool) -> Encoding:
        spec = self._placement.specs[site.name]
        axis = next((y.axis for y in self._placement.layers if y.weight == site), None)
        if spec.power_of_2 and not encoding.is_power_of_two:
            if not snap:
                scale = float(encoding.scale[np.frexp(encoding.scale)[0] != 0.5].flat[0])
                raise NotPowerOfTwoError(
                    f"{name}: scale {scale!r} is not a power of two (snap=True rounds it up to one)"
                )
            low, high = (np.atleast_1d(v).astype(np.float32) for v in (encoding.minimum, encoding.maximum))
            form = Format(encoding.grid.bits, encoding.grid.signed, True, encoding.axis)
            encoding = choose("minmax", Observed(low, high, np.stack([low, high], 1)), form)
        if axis is not None and encoding.axis is None:
            channels = self._network.get_parameter(site.name).shape[axis]
            scales = np.full(channels, encoding.scale, np.float32)
            return Encoding(scales, np.full(channels, encoding.zero_point, np.int64), encoding.grid, axis)
        return encoding

    def _derive_biases(self) -> None:
        """Biases take the lattice s_in * s_w of the encodings as they are now, if none is missing."""
        table = self.simulation.encodings()
        if all(s.name in table for s in self._placement.sites if s.role != "bias"):
            self.simulation.calibrate((), {"bias"})

    def _artifact(self, example: Tensor | Sequence[Tensor]) -> Artifact:
        self._derive_biases()
        batch: Batch = tuple(example) if isinstance(example, (tuple, list)) else example  # type: ignore[assignment]
        return self.simulation.export(batch)

    def _torch_named(self) -> str:
        """The encodings as AIMET names them: by module, an input of the network where it is read."""
        self._derive_biases()
        table = self.simulation.encodings()
        parameters = {s.name for s in self._placement.sites if s.role in ("weight", "bias")} & table.keys()
        plain = json.loads(aimet_encodings.dumps(table, parameters, "0.6.1"))
        activations: dict[str, dict[str, dict[str, Any]]] = {}
        for node in self._network.graph.nodes:
            if node.op != "call_module":
                continue
            module: dict[str, dict[str, Any]] = {}
            for index, source in enumerate(node.args):
                if getattr(source, "op", "") == "placeholder" and source.target in plain["activation_encodings"]:
                    (entry,) = plain["activation_encodings"][source.target]
                    module.setdefault("input", {})[str(index)] = entry
            if tensor_name(node) in plain["activation_encodings"]:
                module["output"] = {"0": plain["activation_encodings"][tensor_name(node)][0]}
            if module:
                activations[str(node.target)] = module
        document = {
            "version": "0.6.1",
            "activation_encodings": activations,
            "param_encodings": plain["param_encodings"],
        }
        return json.dumps(document, indent=2) + "\n"


class _OnAimet(QuantizationSimModel):
    """On AIMET: everything else that AIMET's class has, from AIMET's own object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        type(self._aimet.quantsim).register(type(self))  # AIMET's functions ask for an instance of its class

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "simulation" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._aimet.quantsim, name)

    @property
    def _aimet(self) -> Any:
        return self.simulation

    def constrain(self) -> None:
        """Puts the constraint back after AIMET's mixed precision, which leaves plain quantizers; biases follow."""
        self._aimet.constrain()
        self._derive_biases()

    def set_percentile_value(self, percentile_value: float) -> None:
        """Raises ConfigError: our chooser, not AIMET's, takes the percentile."""
        raise ConfigError("set_percentile_value: the percentile is fixed (pow2_constraints.snap.PERCENTILE)")

    def _configured(self, plan: QuantPlan, example: Batch, config_file: str, bits: dict[str, int]) -> QuantPlan:
        from pow2quant.backends.aimet.constrained import configured

        return configured(self._network, example, plan, config_file, bits)

    def _frozen(self) -> frozenset[str]:
        frozen: frozenset[str] = self._aimet.frozen
        return frozen

    def _mark(self, names: Collection[str], requires_grad: bool | None, allow_overwrite: bool | None) -> None:
        for quantizer in self._aimet.quantsim.quantizers():
            if quantizer.site.name in names:
                if requires_grad is not None:
                    quantizer.requires_grad_(requires_grad)
                if allow_overwrite is not None:
                    quantizer.allow_overwrite(allow_overwrite)


class _OnnxExporter:
    """What `sim.onnx` is."""

    def __init__(self, sim: QuantizationSimModel) -> None:
        self.sim = sim

    def export(
        self,
        args: Tensor | Sequence[Tensor],
        f: str | os.PathLike[str],
        *,
        encoding_version: str | None = None,
        export_int32_bias: bool = True,
        force_activation_as: str | None = "unsigned",
        **kwargs: Any,
    ) -> None:
        """Writes the float ONNX (weights on their grids) and, beside it, `.encodings` of a version.

        kwargs: those of `torch.onnx.export`, of which `input_names`, `output_names` and `opset_version` count; the file
        is written without torch's exporter. Raises ConfigError for what has no meaning here, OutputError.
        """
        if force_activation_as == "signed":
            raise ConfigError("force_activation_as: grids are exported as they are simulated; quantize symmetrically")
        artifact = _renamed(self.sim._artifact(args), dict(kwargs))
        table = artifact.encodings
        biases = {f"{y.module}.bias" for y in self.sim._placement.layers if not export_int32_bias}
        artifact = Artifact(artifact.model, {name: e for name, e in table.items() if name not in biases})
        onnx_qdq.save(artifact.model, Path(f))
        _write_encodings(artifact, Path(f).with_suffix(".encodings"), encoding_version or "1.0.0")


def _refuse_without_encodings(model: nn.Module, _args: Any) -> None:
    """As AIMET does. Raises NotCalibratedError, unless the model is being observed or has nothing to quantize."""
    quantizers = [m for m in model.modules() if hasattr(m, "tap") and hasattr(m, "encoding")]
    if quantizers and not any(q.encoding is not None or q.tap is not None for q in quantizers):
        raise NotCalibratedError("the model has no encodings yet: call sim.compute_encodings or sim.load_encodings")


def _range(scheme: Any) -> str:
    name = getattr(scheme, "name", scheme)
    if name not in RANGES:
        raise ConfigError(f"quant_scheme: {name!r} is not one of {', '.join(RANGES)}")
    return RANGES[name]


def _plan(chooser: str, bits: dict[str, int], data_type: str) -> QuantPlan:
    if data_type not in ("int", "float"):
        raise ConfigError(f"default_data_type: {data_type!r} is not int or float")
    for key, width in bits.items():
        if width < 32 and (data_type == "float" or width not in WIDTHS["output"]):
            raise ConfigError(f"{key}: {width} bits; integers have 2 to 16, float tensors 32")
    legal = {key: width if width < 32 else 8 for key, width in bits.items()}
    plan = QuantPlan.default(legal["default_param_bw"], legal["default_output_bw"])

    def role(spec: TensorSpec | None, key: str) -> TensorSpec | None:
        return replace(spec, range=chooser) if spec is not None and bits[key] < 32 else None

    output, weight = role(plan.output, "default_output_bw"), role(plan.weight, "default_param_bw")
    return replace(plan, weight=weight, output=output, input=role(plan.input, "default_output_bw"))


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _onnx_types(network: fx.GraphModule) -> dict[str, str]:
    """What ONNX calls the modules of a prepared network, by name."""
    types = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            module, graph = network.get_submodule(str(node.target)), OnnxGraph()
            row = operator(module)
            assert row is not None
            sources = [a for a in node.args if hasattr(a, "meta")]
            names, shapes = (tuple(a.name for a in sources), tuple(a.meta["shape"] for a in sources))
            row.emit(module, Node(str(node.target), names, node.name, shapes, {"weight": "w", "bias": "b"}), graph)
            types[str(node.target)] = graph.nodes[-1].op_type if graph.nodes else row.onnx
    return types


def _axis(network: fx.GraphModule, module: str) -> int:
    return weight_axis(network.get_submodule(module)) or 0


Places = dict[str, "tuple[Site | None, int]"]
"""By a tensor's name in a file: the site whose encoding it has, and 0 for its own, 1 for one that is passed on."""


def _place_of(node: fx.Node, placement: Placement) -> tuple[Site | None, int]:
    own = placement.quantized.get(node.name)
    return (own, 0) if own is not None else (placement.carried[node.name], 1)


def _torch_places(network: fx.GraphModule, placement: Placement) -> Places:
    """The names of AIMET's files that are named after torch modules, and of our own ONNX files."""
    places: Places = {s.name: (s, 0) for s in placement.sites if s.role == "weight"}
    for node in network.graph.nodes:
        if node.op == "output":
            continue
        places[tensor_name(node)] = _place_of(node, placement)
        for index, source in enumerate(node.args):
            name = f"{node.target}.input" + (f".{index}" if index else "")
            places[name] = (_place_of(source, placement)[0], 1)
    return places


ALIKE = (
    {"ReduceMean", "GlobalAveragePool", "AveragePool"},
    {"Flatten", "Reshape", "Squeeze", "Unsqueeze"},
    {"Relu", "Clip"},
    {"Gemm", "MatMul"},
    {"Add", "Sub", "Mul", "Div"},
)
"""Operations that different exporters write for the same module."""


def _onnx_places(network: fx.GraphModule, placement: Placement, model: ModelProto) -> Places:
    """The tensor names of somebody else's ONNX file of the same network, found by walking both graphs side by side.

    A weighted node is known by the name of its weight, every other by what it reads and what it does.
    """
    same = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in ("Identity", "Cast", "Dropout")}

    def source(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    initializers = {t.name for t in model.graph.initializer}
    arguments = iter([i.name for i in model.graph.input if i.name not in initializers])
    types = _onnx_types(network)
    taken: set[int] = set()
    tensors: dict[fx.Node, str] = {}
    places: Places = {}
    for node in network.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            tensors[node] = next(arguments, "")
        else:
            kinds = next((k for k in ALIKE if types[str(node.target)] in k), {types[str(node.target)]})
            reads = {tensors.get(a, "") for a in node.args if hasattr(a, "op")}
            weighted = _kind(network, node) is Kind.WEIGHTED
            for number, other in enumerate(model.graph.node):
                inputs = {source(i) for i in other.input}
                named = weighted and f"{node.target}.weight" in inputs
                if number not in taken and (named or (other.op_type in kinds and reads <= inputs)):
                    taken.add(number)
                    tensors[node] = other.output[0]
                    break
        places[tensors.get(node, "")] = _place_of(node, placement)
    places |= {name: (places[source(name)][0], 1) for name in same if source(name) in places}
    places.pop("", None)
    return places


def _kind(network: fx.GraphModule, node: fx.Node) -> Kind | None:
    row = operator(network.get_submodule(str(node.target)))
    return row.kind if row is not None else None


def _document(encodings: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """The content of an encodings file with both of its parts, and its name."""
    source = "<encodings>"
    if not isinstance(encodings, Mapping):
        source = str(encodings)
        try:
            encodings = foreign.parsed(foreign.text(encodings, foreign.MOST_JSON))
        except ValueError as error:
            raise FileFormatError(f"{source}: cannot be read as an encodings file: {error}") from error
    if not isinstance(encodings, Mapping):
        raise FileFormatError(f"{source}: expected an object at the top")
    if "encodings" in encodings:
        return dict(encodings), source
    if not {"param_encodings", "activation_encodings"} & encodings.keys():  # AdaRound's, before AIMET 1.32
        encodings = {"param_encodings": encodings}
    return {"param_encodings": {}, "activation_encodings": {}, **encodings}, source


def _onnx_model(model: ModelProto | str | os.PathLike[str] | None, encodings: Any) -> ModelProto | None:
    if isinstance(model, ModelProto):
        return model
    if model is None:
        if isinstance(encodings, Mapping):
            return None
        model = Path(encodings).with_suffix(".onnx")
        if not model.is_file():
            return None
    return onnx_qdq.load(Path(model))


def _renamed(artifact: Artifact, arguments: dict[str, Any]) -> Artifact:
    """The artifact with the inputs' and outputs' names and the opset that torch's exporter was asked for."""
    graph = artifact.model.graph
    renamed: dict[str, str] = {}
    for key, values in (("input_names", graph.input), ("output_names", graph.output)):
        names = arguments.get(key) or [v.name for v in values]
        if len(names) != len(values):
            raise ConfigError(f"{key}: {len(names)} names for {len(values)} tensors")
        renamed |= {value.name: name for value, name in zip(values, names, strict=True)}
    for value in (*graph.input, *graph.output):
        value.name = renamed[value.name]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    model, opset = artifact.model, arguments.get("opset_version")
    if opset is not None and opset < model.opset_import[0].version:
        try:
            model = version_converter.convert_version(model, opset)
        except Exception as error:  # the converter raises whatever its C++ raises
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"opset_version: the network cannot be written with opset {opset}: {reason}") from error
    return Artifact(model, {renamed.get(name, name): e for name, e in artifact.encodings.items()})


def _write_encodings(artifact: Artifact, path: Path, version: str) -> None:
    parameters = {tensor.name for tensor in artifact.model.graph.initializer}
    write(path, aimet_encodings.dumps(artifact.encodings, parameters, version).encode())
