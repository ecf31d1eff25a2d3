"""A simulation of the prepared network with the members of AIMET's class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pow2quant.adapters import aimet_config
from pow2quant.adapters.aimet_members import MEMBERS
from pow2quant.artifact import Site
from pow2quant.backends import state
from pow2quant.backends.base import ALL, Batch, Simulation
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import ConfigError
from pow2quant.frontends.export import unwrapped
from pow2quant.frontends.prepare import prepare
from pow2quant.frontends.returned import like
from pow2quant.pow2_constraints import Encoding
from pow2quant.quantsim import attributes, training
from pow2quant.quantsim.checks import refuse_quantized
from pow2quant.quantsim.files import Files
from pow2quant.quantsim.members import summary
from pow2quant.quantsim.names import onnx_types, readers
from pow2quant.quantsim.ranges import Ranges
from pow2quant.quantsim.running import OWNER, Owner, checked, in_eval_mode
from pow2quant.quantsim.schemes import QuantScheme, chooser_of, plan_of
from pow2quant.runs import simulation_of

if TYPE_CHECKING:
    from torch import nn

_UNSET: Any = object()


class PreparedSim(Files):
    """What `model.QuantizationSimModel` is, around a prepared copy of the network, on `custom`."""

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
        network = prepare(model, example)
        norms = training.batch_norms(network)
        network = fold_batch_norm(network)
        plan = plan_of(chooser_of(self.quant_scheme), bits, getattr(default_data_type, "name", default_data_type))
        self._plan = plan if config_file is None else self._configured(network, plan, example, config_file, bits)
        self._changes: dict[Site, TensorSpec | None] = {}
        self._ranges_kept: dict[str, tuple[Encoding, Encoding]] = {}
        self.frozen: frozenset[str] = frozenset()
        self.simulation: Simulation = simulation_of(network, example, self._plan, backend)
        training.restore(self.simulation.model, unwrapped(model), norms)
        self.simulation.model.to(device)
        self._model = like(self.simulation.model, unwrapped(model))
        state.keep(self._model)
        self._model.register_load_state_dict_post_hook(Owner.adopt_widths)
        self._attach()

    def __getattr__(self, name: str) -> Any:
        if name in MEMBERS:
            raise AttributeError(f"{name}: {MEMBERS[name].custom}")
        missing = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(f'{missing}; AIMET\'s functions need backend="aimet"')

    def __setstate__(self, members: dict[str, Any]) -> None:
        self.__dict__.update(members)
        self._attach()
        self.encodings()

    def _attach(self) -> None:
        """What a model has of its simulation, and a copy of it has not."""
        vars(self._model)[OWNER] = Owner(self)
        if checked not in self._model._forward_pre_hooks.values():  # fx copies none
            self._model.register_forward_pre_hook(checked, with_kwargs=True)
        self._show()
        self.ranges = self._trained()

    def __str__(self) -> str:
        table = self.encodings()
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

        before = self.encodings()
        fixed = self.frozen
        roles = {s.role for s in self.sites if s.name not in fixed} | {"bias"}
        held = {name: e for name, e in before.items() if name in fixed}
        try:
            with in_eval_mode(self.model), self.resting():
                table = self.simulation.calibrate(while_observing(), ALL & roles)
            if not held.items() <= table.items():
                self.simulation.load(table | held)
                self.derive_biases()
            self.encodings()
        except BaseException:
            self.simulation.load(before)
            raise

    def resting(self) -> AbstractContextManager[None]:
        """While it lasts, ranges that are trained follow no encodings."""
        return nullcontext() if self.ranges is None else self.ranges.resting()

    def adopt_widths(self) -> None:
        """Takes over the widths of encodings that were put into the model by a state."""
        table = self.encodings()
        changed = [s for s in self.sites if s.role != "bias" and s.name in table]
        changed = [s for s in changed if table[s.name].grid.width != self.spec(s).bits]
        if changed:
            self._changes |= {s: replace(self.spec(s), bits=table[s.name].grid.width) for s in changed}
            self._replan()
            self.simulation.load(table)

    # -- what the aimet backend does differently -----------------------------------------------------------------------

    def _show(self) -> None:
        from pow2quant.backends.aimet.modules import make_known

        make_known(FakeQuantize)
        attributes.attach(self)

    def _trained(self) -> Ranges | None:
        name = str(getattr(self.quant_scheme, "name", self.quant_scheme))
        return Ranges(self, self._model) if name.startswith("training_range_learning") else None

    def _configured(
        self, network: Any, plan: QuantPlan, example: Batch, config_file: str, bits: dict[str, int]
    ) -> QuantPlan:
        from pow2quant.backends.aimet.modules import shipped

        if config_file == "default":  # what AIMET means by it is our default
            return plan
        (end,) = [n for n in network.graph.nodes if n.op == "output"]
        outputs = {str(n.target) for n in end.all_input_nodes}
        return aimet_config.plan(shipped(config_file), plan, onnx_types(network), outputs, readers(network))
