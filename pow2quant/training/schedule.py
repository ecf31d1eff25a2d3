"""What a configuration says about training, as objects: criterion, optimizer, scheduler, what is quantized when."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pow2quant.artifact import Site
from pow2quant.config import Choice, TrainingConfig, from_file, is_in_file, users_code
from pow2quant.errors import ConfigError, Pow2QuantError
from pow2quant.tasks.segmentation import LEFT_OUT

LENGTHS = ("T_max", "total_steps", "total_iters")
"""Parameters by which torch's schedulers are told how long they last."""


Criterion = Callable[[Any, Any], Tensor]
"""(results, targets) -> the mean loss."""


def criterion_of(config: TrainingConfig, default: str) -> Criterion:
    """The loss of (results, targets); default: its name where the configuration has none. Lists are class weights.

    Raises ConfigError for a name that torch does not know, for wrong parameters, and where there is no loss at all.
    """
    choice = config.criterion or Choice(default)
    if not choice.name:
        if config.distillation < 1:
            raise ConfigError(
                "training.criterion: the task has no loss of its own; give one (file.py:function), or "
                "training.distillation: 1 to learn from the float network alone"
            )
        choice = Choice("MSELoss")
    values = {
        key: torch.tensor(value, dtype=torch.float32) if _is_numbers(value) and not is_in_file(choice.name) else value
        for key, value in choice.parameters.items()
    }
    made: Criterion = _made("criterion", choice._replace(parameters=values), nn, ())
    if not callable(made):
        raise ConfigError(f"training.criterion: {choice.name} made a {type(made).__name__}, which is no loss")
    return made


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(x, (int, float)) for x in value)


def loss_of(criterion: Criterion, results: Any, targets: Any) -> Tensor:
    """The loss of one batch: of the first result where there are several and the criterion is one of torch's.

    Raises ConfigError where the criterion cannot take such results and targets.
    """
    if isinstance(criterion, nn.Module):
        results, targets = _fitted(criterion, results[0] if isinstance(results, (tuple, list)) else results, targets)
        require_learnable(results)
    what = type(criterion).__name__ if isinstance(criterion, nn.Module) else getattr(criterion, "__name__", "it")
    try:
        loss = criterion(results, targets)
    except (Pow2QuantError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"training.criterion: {what} does not fit the data: {reason}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"training.criterion: {what} gave {got}; the loss of a batch is one float in a tensor")
    return loss.reshape(())


def require_learnable(results: Tensor) -> None:
    """Raises ConfigError for integers."""
    if not results.is_floating_point():
        raise ConfigError(
            "training: the network's first result is integers (it ends in argmax?), from which nothing is learned; "
            "train it without its last operation"
        )


def _fitted(criterion: nn.Module, results: Tensor, targets: Any) -> tuple[Tensor, Any]:
    """Results and targets as a loss of torch takes them; what data sets leave out is LEFT_OUT by now."""
    if not isinstance(targets, Tensor):
        return results, targets
    if isinstance(criterion, ELEMENTWISE) and targets.numel() == results.numel():
        given = targets.reshape(results.shape)
        targets = given.to(results.dtype)
        if given.is_floating_point():
            return results, targets
        left_out = given == LEFT_OUT
        return (results[~left_out], targets[~left_out]) if left_out.any() else (results, targets)
    ignored = getattr(criterion, "ignore_index", None)
    if isinstance(ignored, int) and not targets.is_floating_point():
        targets = targets.masked_fill(targets == LEFT_OUT, ignored)
        if targets.shape == results.shape[:-1] != results.shape[:1] + results.shape[2:]:
            results = results.movedim(-1, 1)  # tokens have their classes in the last dimension
    return results, targets


ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.BCELoss)
"""Losses whose targets have the shape of the results."""


OWN_KEYS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Parameters of optimizers that have a key of their own in `training`."""


def optimizer_of(config: TrainingConfig, parameters: Iterable[Tensor]) -> Optimizer:
    """The optimizer of the float weights and biases; biases do not decay. Raises ConfigError as above."""
    for key, value in config.optimizer.parameters.items():
        if key in OWN_KEYS:
            raise ConfigError(f"training.optimizer: {key} is set by training.{OWN_KEYS[key]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"training.optimizer: {key}: {value} is not legal; legal: a finite number")
    trained = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    values = {"lr": config.learning_rate, "weight_decay": config.weight_decay, **config.optimizer.parameters}
    made = _made(
        "optimizer", config.optimizer._replace(parameters=values), torch.optim, ([g for g in groups if g["params"]],)
    )
    if not isinstance(made, Optimizer):
        raise ConfigError(f"training.optimizer: {config.optimizer.name} made no torch.optim.Optimizer")
    return made


class Schedule:
    """A scheduler of torch and when it steps: with every batch where its length was left to us, else per epoch."""

    def __init__(self, config: TrainingConfig, optimizer: Optimizer, steps: int) -> None:
        """steps: of the whole training."""
        self.scheduler: LRScheduler | None = None
        self.every_step = False
        self.choice = config.scheduler
        if config.scheduler is None:
            return
        choice = config.scheduler
        known = _parameters("scheduler", choice, torch.optim.lr_scheduler)
        length = next((name for name in LENGTHS if name in known), None)
        if length is not None and length not in choice.parameters and "epochs" not in choice.parameters:
            self.every_step = True
            choice = choice._replace(parameters={**choice.parameters, length: steps})
        if "max_lr" in known:
            choice = choice._replace(parameters={"max_lr": config.learning_rate, **choice.parameters})
        made = _made("scheduler", choice, torch.optim.lr_scheduler, (optimizer,))
        if not all(callable(getattr(made, name, None)) for name in ("step", "state_dict", "load_state_dict")):
            raise ConfigError(f"training.scheduler: {choice.name} made a {type(made).__name__}, which is no scheduler")
        self.scheduler = made

    def after_step(self) -> None:
        """To be called behind every optimizer step."""
        if self.scheduler is not None and self.every_step:
            with self._told():
                self.scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """To be called behind every epoch, with its mean loss."""
        if self.scheduler is None or self.every_step:
            return
        with self._told():
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(loss)
            else:
                self.scheduler.step()

    def _told(self) -> AbstractContextManager[None]:
        assert self.choice is not None
        return told("scheduler", self.choice)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: no functions, which the configuration gives again."""
        state = {} if self.scheduler is None else self.scheduler.state_dict()
        return {key: value for key, value in state.items() if not callable(value)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state})


def quantized_share(config: TrainingConfig, epoch: int) -> float:
    """The share of sites that are quantized in an epoch (0, 1, ...): none, then growing linearly, then all."""
    behind = epoch - config.warmup_epochs
    if behind < 0:
        return 0.0
    return 1.0 if behind >= config.gradual_epochs else (behind + 1) / (config.gradual_epochs + 1)


def quantized_sites(sites: Sequence[Site], config: TrainingConfig) -> list[Site]:
    """The sites that training quantizes. Biases are not among them: their scale follows from two others'."""
    return [s for s in sites if s.role == "weight" or (config.mode == "full" and s.role != "bias")]


def active(sites: Sequence[Site], config: TrainingConfig, epoch: int) -> frozenset[str]:
    """The names of those of `quantized_sites` that are quantized in an epoch, in order of computation."""
    return frozenset(s.name for s in sites[: math.ceil(quantized_share(config, epoch) * len(sites))])


def _thing(role: str, choice: Choice, home: Any) -> Any:
    if is_in_file(choice.name):
        return from_file(choice.name)
    thing = getattr(home, choice.name, None)
    if not callable(thing):
        raise ConfigError(
            f"training.{role}: {choice.name!r} is unknown; legal: a name in {home.__name__}, or path/to/file.py:NAME"
        )
    return thing


def _parameters(role: str, choice: Choice, home: Any) -> list[str]:
    return list(inspect.signature(_thing(role, choice, home)).parameters)


def _made(role: str, choice: Choice, home: Any, arguments: tuple[Any, ...]) -> Any:
    """What is called `choice.name`, made with its parameters; a function that is a loss already stays itself."""
    thing = _thing(role, choice, home)
    if role == "criterion" and not isinstance(thing, type) and not choice.parameters:
        return thing
    with told(role, choice):
        return thing(*arguments, **choice.parameters)


@contextmanager
def told(role: str, choice: Choice) -> Iterator[None]:
    """Around what a configuration chose for training: what it raises becomes a ConfigError that names the key."""
    try:
        with users_code(choice.name, ConfigError) if is_in_file(choice.name) else nullcontext():
            yield
    except Pow2QuantError as error:
        raise ConfigError(f"training.{role}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"training.{role}: {choice.name}: {type(error).__name__}: {reason}") from error
