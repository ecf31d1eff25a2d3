"""A quantized network as a module that trains in any loop: one's own, Lightning's, Accelerate's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pow2quant.errors import ConfigError, TrainingError
from pow2quant.training.learning import Learning

R = TypeVar("R")

EXPONENT_RATE = 0.01
"""Of Adam, for exponents."""


class QatModel(nn.Module, Generic[R]):
    """Computes with quantized weights, and with quantized activations where the configuration says `mode: full`.

    Called like the network, with its inputs in a row. Its parameters are the float weights, gains and shifts of live
    batch norm, and the exponents; its state_dict holds them, its running statistics, and what is known of exponents, so
    that a checkpoint of it continues. In training mode batch norm is live until `freeze_batch_norm()`, and exponents
    move until `freeze_exponents()`; in evaluation mode it computes as the finished network will.
    """

    def __init__(
        self,
        learning: Learning,
        names: Mapping[int, str],
        batches: Iterable[Sequence[Tensor]],
        finish: Callable[..., R],
    ) -> None:
        """learning: of a calibrated simulation. names: of its parameters by id. batches: for running statistics.

        finish: what becomes of the trained simulation, given (output, overwrite=).
        """
        super().__init__()
        self._learning, self._live, self._open = learning, True, ExitStack()
        self._finish: Callable[..., R] | None = finish
        self._open.enter_context(learning.computing())
        if len(learning.norms):
            learning.measure(batches)
        for index, tensor in enumerate(learning.tensors):
            name = names.get(id(tensor), f"weight_{index}").replace(".", "_")
            self.register_parameter(f"{name}_{index}" if hasattr(self, name) else name, tensor)
        for index, parameter in enumerate(learning.exponents.parameters()):
            self.register_parameter(f"exponent_{index}", parameter)
        self.register_buffer("statistics", learning.norms.statistics)
        self.register_buffer("gains", learning.norms.gains)
        for name, buffer in learning.exponents.state().items():
            self.register_buffer(f"exponents_{name}", buffer)
        vectors = {buffer.untyped_storage().data_ptr() for buffer in self.buffers()}
        self._views = {n for n, p in self.named_parameters() if p.untyped_storage().data_ptr() in vectors}
        self._version = self._versions()

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As of any module; the optimizer's last step is followed first."""
        self._take_step()
        return super().state_dict(*arguments, **options)

    def forward(self, *inputs: Tensor) -> Any:
        """The results for inputs (N, …), as float32 tensors."""
        if self._finish is not None:
            self._take_step()
        with self._learning.norms.on_batches(self.training and self._live and self._finish is not None):
            return self._learning.sim.model(*inputs)

    def parameter_groups(self, learning_rate: float, exponent_learning_rate: float = EXPONENT_RATE) -> list[Any]:
        """Parameters for an optimizer: weights with one learning rate, exponents with theirs and without decay."""
        exponents = self._learning.exponents.parameters()
        groups: list[dict[str, Any]] = [{"params": self._learning.tensors, "lr": learning_rate}]
        if exponents:
            groups.append({"params": exponents, "lr": exponent_learning_rate, "weight_decay": 0.0})
        return groups

    def freeze_batch_norm(self) -> None:
        """From now on batch norm uses its running statistics, as the finished network does."""
        self._live = False

    def freeze_exponents(self) -> None:
        """From now on every scale stays where its running mean is."""
        self._take_step()
        self._learning.exponents.freeze()

    def finish(self, output: Any = None, *, overwrite: bool = False) -> R:
        """Folds batch norm, settles all encodings, exports, checks in every executor; returns the run's `Result`.

        output: the run's folder; default: a temporary one, which goes with the result.
        Raises TrainingError when weights are not finite, or when this is done already.
        """
        if self._finish is None:
            raise TrainingError("this training is finished already; qat_model(...) begins another")
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters()):
            raise TrainingError("training has diverged: weights are not finite; lower the learning rate")
        self._take_step()
        self._open.close()
        self._learning.settle()
        result = self._finish(output, overwrite=overwrite)  # again, where the folder cannot be written
        self._finish = None
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Parameters that are parts of one vector are saved as that vector: formats that refuse views take it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._views:
            del destination[prefix + name]

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        """Into what is there, by itself or as a part of another module. Raises ConfigError for `assign`."""
        if metadata.get("assign_to_params_buffers"):
            raise ConfigError("load_state_dict(assign=True): parameters are shared with the simulation; leave it out")
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *more)
        missing[:] = [name for name in missing if name.removeprefix(prefix) not in self._views]
        self._learning.exponents.restore({})
        self._version = self._versions()

    def _take_step(self) -> None:
        """Follows the optimizer, once for each of its steps."""
        now = self._versions()
        if now != self._version:
            self._learning.norms.advance()
            self._learning.exponents.advance()
            self._version = self._versions()

    def _versions(self) -> int:
        return sum(parameter._version for parameter in self.parameters())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises ConfigError before `finish`: what it needs of the simulation behind the parameters is not copied."""
        if self._finish is not None:
            raise ConfigError("a model in training is neither copied nor pickled; copy its state_dict() instead")
        return super().__reduce_ex__(protocol)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Raises ConfigError where parameters would move: the simulation behind them would stay."""
        probe = next(self.parameters())
        moved = fn(probe[:0] if probe.ndim else probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise ConfigError("give the device to qat_model(..., config={'device': 'cuda'}); it trains in float32")
        return self
