"""AIMET's `QuantizationSimModel`, with every scale a power of two (see `pow2quant.quantsim`)."""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pow2quant.adapters import aimet_config, aimet_encodings
from pow2quant.adapters.aimet_members import MEMBERS
from pow2quant.artifact import Artifact, Site
from pow2quant.backends.base import ALL, Batch, Simulation
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import ConfigError, NotCalibratedError
from pow2quant.frontends.export import unwrapped
from pow2quant.frontends.prepare import prepare
from pow2quant.frontends.returned import like
from pow2quant.quantsim import attributes, export, loading
from pow2quant.quantsim.checks import refuse_quantized
from pow2quant.quantsim.members import Members, summary
from pow2quant.quantsim.names import channel_axis, onnx_types, readers
from pow2quant.quantsim.schemes import QuantScheme, chooser_of, plan_of
from pow2quant.runs import simulation_of
from pow2quant.saving import write

if TYPE_CHECKING:
    import os

    from onnx import ModelProto
    from torch import nn

PLACEMENTS = ("pow2quant", "aimet")
"""Where quantizers may stand: ours, one per tensor, or AIMET's."""

_UNSET: Any = object()


class QuantizationSimModel(Members, ABC):
    """Simulates a quantized network with AIMET's interface (see the package).

    model: left unchanged. dummy_input: inputs of one call, (N, …) each. quant_scheme: AIMET's, or its name; None takes
    the encodings of least squared error. default_output_bw, default_param_bw: 2 to 16; from 32 on, or with a
    `default_data_type` of float and 32 bits, these tensors stay float. config_file: AIMET's files and aliases; with
    `custom` the part that has a meaning here (`adapters.aimet_config`). placement: where quantizers stand, "aimet" (the
    default with `backend="aimet"`: an object of AIMET's own class, around the network as it is, quantizers where AIMET
    puts them; only scales differ) or "pow2quant" (one per tensor of the prepared network, equal bits on both backends).
    Raises UnsupportedModelError, WeightsError and ModelError as `prepare` does, ConfigError for impossible arguments.
    """

    def __new__(
        cls, *args: Any, backend: str = "custom", placement: str | None = None, **kwargs: Any
    ) -> QuantizationSimModel:
        """A simulation on `aimet` is of AIMET's own class, or, with our placement, has what that class has."""
        if placement not in (None, *PLACEMENTS):
            raise ConfigError(f"placement: {placement!r} is not one of {', '.join(PLACEMENTS)}")
        if placement == "aimet" and backend != "aimet":
            raise ConfigError('placement: AIMET\'s own places need backend="aimet"')
        if backend == "aimet" and placement != "pow2quant":
            from pow2quant.backends.aimet.constrained import tools

            own: Any = QuantizationSimModel.register(tools()["QuantizationSimModel"])
            made: QuantizationSimModel = own(*args, **kwargs)
            return made
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
        placement: str | None = None,
    ) -> None:
        if in_place:
            raise ConfigError('in_place: the network is prepared as a copy: use sim.model, or backend="aimet"')
        if rounding_mode != "nearest":
            raise ConfigError(f"rounding_mode: {rounding_mode!r} is not 'nearest' (half to even)")
        refuse_quantized(model)
        device = next((p.device for p in model.parameters()), "cpu")
        example: Batch = tuple(dummy_input) if isinstance(dummy_input, (tuple, list)) else dummy_input  # type: ignore[assignment]
        self.quant_scheme = QuantScheme.post_training_tf_enhanced if quant_scheme is None else quant_scheme
        bits = {"default_output_bw": default_output_bw, "default_param_bw": default_param_bw}
        network = fold_batch_norm(prepare(model, example))
        plan = plan_of(chooser_of(self.quant_scheme), bits, getattr(default_data_type, "name", default_data_type))
        self._plan = plan if config_file is None else self._configured(network, plan, example, config_file, bits)
        self._changes: dict[Site, TensorSpec | None] = {}
        self.frozen: frozenset[str] = frozenset()
        self.simulation: Simulation = simulation_of(network, example, self._plan, backend)
        self.simulation.model.to(device)
        self._model = like(self.simulation.model, unwrapped(model))
        self._model.register_forward_pre_hook(_checked, with_kwargs=True)
        self._show()

    def __getattr__(self, name: str) -> Any:
        if name in MEMBERS:
            raise AttributeError(f"{name}: {MEMBERS[name].custom}")
        missing = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(f'{missing}; AIMET\'s functions need backend="aimet"')

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._show()

    def __str__(self) -> str:
        table = self.simulation.encodings()
        rows = [f"{s.name:40} {self.spec(s).bits:2} bits  {summary(table.get(s.name))}" for s in self.sites]
        return "\n".join([f"Quantized model: {len(rows)} quantizers", *rows])

    @property
    def model(self) -> nn.Module:
        """The network that computes with fake-quantized values, and returns what the user's does; train this one."""
        return self._model

    @property
    def quant_args(self) -> dict[str, Any]:
        """What an encodings file says of the arguments."""
        return {"quant_scheme": getattr(self.quant_scheme, "name", self.quant_scheme)}

    # -- calibration ---------------------------------------------------------------------------------------------------

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

        before = self.simulation.encodings()
        fixed = self.frozen
        roles = {s.role for s in self.sites if s.name not in fixed} | {"bias"}
        held = {name: e for name, e in before.items() if name in fixed}
        try:
            with _in_eval_mode(self.model):
                table = self.simulation.calibrate(while_observing(), ALL & roles)
            if not held.items() <= table.items():
                self.simulation.load(table | held)
                self.derive_biases()
        except BaseException:
            self.simulation.load(before)
            raise

    # -- files ---------------------------------------------------------------------------------------------------------

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
        """Takes encodings from a file or its content: versions 0.6.1, 1.0.0, 2.x, named after torch or ONNX.

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
        content, _ = loading.document(encoding_path)
        content.pop("activation_encodings", None)
        self._load(content, {"weight"}, True, True, False, False, loading.beside(encoding_path), snap)

    def load_and_freeze_encodings(
        self,
        encoding_path: Mapping[str, Any] | str | os.PathLike[str],
        ignore_when_quantizer_disabled: bool = False,
        *,
        snap: bool = False,
    ) -> None:
        """`load_encodings` for good: afterwards nothing changes what was loaded."""
        self._load(encoding_path, ALL, not ignore_when_quantizer_disabled, True, False, False, None, snap)

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
        document, source = loading.document(encodings)
        placement, network = self.simulation.placement, self.simulation.network
        axes = {y.weight.name: channel_axis(network, y.module) for y in placement.layers if y.weight is not None}
        table = aimet_encodings.read(document, source, axes)
        found = loading.by_site(
            table, network, placement, roles, strict, source, lambda: loading.onnx_model(model, encodings)
        )
        self._mark((), requires_grad, allow_overwrite)
        fitted = {
            site.name: loading.fitted(name, encoding, site, placement, network, snap)
            for site, (name, encoding) in found.items()
            if site.name not in self.frozen
        }
        self.simulation.load((self.simulation.encodings() if partial else {}) | fitted)
        self.derive_biases()
        self._mark(fitted, requires_grad, allow_overwrite)

    def save_encodings_to_json(self, path: str | os.PathLike[str], filename_prefix: str) -> None:
        """Writes `<path>/<filename_prefix>.json`: the encodings named after the modules, as AIMET does (0.6.1)."""
        write(Path(path) / f"{filename_prefix}.json", export.torch_named(self).encode())

    def get_activation_param_encodings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The encodings of activations and of weights, as `save_encodings_to_json` writes them."""
        document = json.loads(export.torch_named(self))
        return document["activation_encodings"], document["param_encodings"]

    @property
    def onnx(self) -> export.OnnxExporter:
        """`sim.onnx.export(args, f, …)`: float ONNX and encodings."""
        return export.OnnxExporter(self)

    def export(
        self,
        path: str | os.PathLike[str],
        filename_prefix: str,
        dummy_input: Tensor | Sequence[Tensor],
        onnx_export_args: Any = None,
        propagate_encodings: bool = False,
        export_to_torchscript: bool = False,
        use_embedded_encodings: bool = False,
        export_model: bool = True,
        filename_prefix_encodings: str | None = None,
        apply_param_qdq: bool = True,
        *,
        encoding_version: str | None = None,
    ) -> None:
        """Writes `<prefix>.onnx` (float, weights on their grids), `<prefix>.encodings` and `<prefix>_torch.encodings`.

        onnx_export_args: AIMET's `OnnxExportApiArgs`, or a mapping with `input_names`, `output_names`, `opset_version`,
        `dynamic_axes`. encoding_version: None for AIMET's global one.
        Raises ConfigError for AIMET's other options, unless they have their defaults; OutputError.
        """
        others = {
            "propagate_encodings": propagate_encodings,
            "export_to_torchscript": export_to_torchscript,
            "use_embedded_encodings": use_embedded_encodings,
            "apply_param_qdq": not apply_param_qdq,
        }
        for key, asked in others.items():
            if asked:
                raise ConfigError(f'export: {key}={key != "apply_param_qdq"} is not supported; use backend="aimet"')
        stem = filename_prefix_encodings or filename_prefix
        version = encoding_version or export.default_version()
        export.pair(self, Path(path), filename_prefix, dummy_input, onnx_export_args, export_model, stem, version)

    def artifact(self, example: Tensor | Sequence[Tensor]) -> Artifact:
        """The float ONNX and its table, as every exporter takes it."""
        self.derive_biases()
        batch: Batch = tuple(example) if isinstance(example, (tuple, list)) else example  # type: ignore[assignment]
        return self.simulation.export(batch)

    # -- what the aimet backend does differently -----------------------------------------------------------------------

    def _show(self) -> None:
        from pow2quant.backends.aimet.modules import make_known

        make_known(FakeQuantize)
        attributes.attach(self)

    def _configured(
        self, network: Any, plan: QuantPlan, example: Batch, config_file: str, bits: dict[str, int]
    ) -> QuantPlan:
        from pow2quant.backends.aimet.modules import shipped

        if config_file == "default":  # what AIMET means by it is our default
            return plan
        (end,) = [n for n in network.graph.nodes if n.op == "output"]
        outputs = {str(n.target) for n in end.all_input_nodes}
        return aimet_config.plan(shipped(config_file), plan, onnx_types(network), outputs, readers(network))

    def _mark(self, names: Collection[str], requires_grad: bool | None, allow_overwrite: bool | None) -> None:
        if requires_grad:
            raise ConfigError('requires_grad: only backend="aimet" trains encodings')
        if allow_overwrite is not None:
            self.frozen = self.frozen - set(names) if allow_overwrite else self.frozen | set(names)


class _OnAimet(QuantizationSimModel):
    """On AIMET, with our placement: everything else that AIMET's class has, from AIMET's own object."""

    frozen = property(lambda self: self._aimet.frozen, lambda self, value: None)

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
        self.derive_biases()

    def _show(self) -> None:
        """AIMET's modules show their quantizers themselves."""

    def _configured(
        self, network: Any, plan: QuantPlan, example: Batch, config_file: str, bits: dict[str, int]
    ) -> QuantPlan:
        from pow2quant.backends.aimet.constrained import configured

        return configured(network, example, plan, config_file, bits)

    def _mark(self, names: Collection[str], requires_grad: bool | None, allow_overwrite: bool | None) -> None:
        for quantizer in self._aimet.quantsim.quantizers():
            if quantizer.site.name in names:
                if requires_grad is not None:
                    quantizer.requires_grad_(requires_grad)
                if allow_overwrite is not None:
                    quantizer.allow_overwrite(allow_overwrite)


def _theirs(name: str) -> property:
    return property(lambda self: getattr(self._aimet.quantsim, name))


for _name in (
    "fold_param_quantizers",
    "exclude_layers_from_quantization",
    "exclude_param_from_quantization",
    "named_quantizers",
    "quantizers",
):
    setattr(_OnAimet, _name, _theirs(_name))


def _checked(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The arguments in float32, which the simulation computes in, whatever the user's network did.

    Raises NotCalibratedError, as AIMET does, unless the model is being observed or has nothing to quantize.
    """
    quantizers = [m for m in model.modules() if hasattr(m, "tap") and hasattr(m, "encoding")]
    if quantizers and not any(q.encoding is not None or q.tap is not None for q in quantizers):
        raise NotCalibratedError("the model has no encodings yet: call sim.compute_encodings or sim.load_encodings")
    return pytree.tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
