"""The loop: trains a simulation's float weights and its exponents, and can be killed at any moment.

A checkpoint holds everything that the rest of the training depends on, so that a resumed run gives the bits of an
uninterrupted one: weights, exponents, running statistics, both optimizers, the schedule, what was measured, torch's
generator, and how many batches of the epoch are done. Every epoch seeds the generators anew, and a resumed epoch draws
its batches again from the start, without computing those that are done: so data come in the same order, with the same
augmentation.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pow2quant.backends.base import SILENT, Batch, Progress, Simulation, inputs, sent
from pow2quant.config import TrainingConfig
from pow2quant.datasets import Data
from pow2quant.errors import ConfigError, FileFormatError, Pow2QuantError, TrainingError
from pow2quant.tasks.base import Task
from pow2quant.tasks.judging import judged, leading
from pow2quant.training import checkpoint, curves, schedule
from pow2quant.training.averaging import Average
from pow2quant.training.curves import Epoch
from pow2quant.training.distilling import Distillation
from pow2quant.training.learning import Learning
from pow2quant.training.losses import Losses
from pow2quant.training.mixing import Mixing
from pow2quant.training.processes import Processes
from pow2quant.training.relative import RelativeSteps

GUESSING = 1.5
"""Training has diverged when an epoch ends with at most so many times the accuracy of guessing, and it began with twice
as much."""

LAYOUT = torch.channels_last
"""Of images and weights in training: convolutions and their gradients are fastest so."""


@dataclass
class Trainer:
    """One training of one simulation, which must be calibrated.

    parameters: the float parameters that are trained, by name. network: the float one. task: says the loss where the
    configuration does not, and the metric by which epochs are compared. teacher: whose logits distillation imitates, on
    the device; None: the float network's. folder: where checkpoints go; None: there are none. identity: what a
    checkpoint must have been made with.
    """

    sim: Simulation
    parameters: Mapping[str, Tensor]
    data: Data
    network: nn.Module
    config: TrainingConfig
    task: Task
    teacher: nn.Module | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    processes: Processes = field(default_factory=Processes)
    folder: Path | None = None
    identity: str = ""
    progress: Progress = SILENT

    def __post_init__(self) -> None:
        if self.config.batch_size % self.processes.size:
            raise ConfigError(
                f"training.batch_size: {self.config.batch_size} cannot be shared by {self.processes.size} processes"
            )
        self.learning = Learning(self.sim, self.parameters, self.config)
        self.exponents, self.norms, self.tensors = self.learning.exponents, self.learning.norms, self.learning.tensors
        self.average = Average(self.tensors, self.config.average)
        self.relative = RelativeSteps(self.tensors, self.config.relative_steps)
        self.mixing = Mixing(self.config)
        self.distillation = Distillation(self.config, self.task, self.network, self.teacher, self.sim, self.device)
        self.learning.watched = self.distillation.watched
        self.steps = len(self.data.train) * self.config.epochs
        self.criterion = schedule.criterion_of(self.config, self.task.loss)
        self.metric = leading(self.task)
        self.classes = self.data.num_classes if self.task.name == "classification" else 0
        if isinstance(self.criterion, nn.Module):
            self.criterion.to(self.device)
        self.optimizer = schedule.optimizer_of(self.config, self.tensors)
        self.schedule = schedule.Schedule(self.config, self.optimizer, self.steps)
        self.exponent_optimizer = (
            torch.optim.Adam(self.exponents.parameters(), self.config.exponent_learning_rate, foreach=True)
            if self.exponents.parameters() and self.config.exponents != "fixed"
            else None
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "float16")
        self.history: list[Epoch] = []
        self.best: dict[str, Any] = {}
        self.epoch, self.batch = 0, 0
        self.flips, self.seconds = torch.zeros((), dtype=torch.int64, device=self.device), 0.0
        self.losses = Losses(math.log(self.classes) if self.classes > 1 else 1.0, self._diverged, self.device)
        self._measure_statistics()
        self.processes.take_from_leader(self.learned)

    def _measure_statistics(self) -> None:
        """Running statistics are at first those of the network as PTQ left it, on calibration data."""
        if len(self.norms):
            with self.training():
                self.learning.measure(self._placed(batch) for batch, _ in self.data.calibration)
            self.sim.load(self.learning.table)

    @property
    def active(self) -> frozenset[str]:
        """The names of the sites that are quantized in this epoch."""
        return self.learning.active

    @property
    def path(self) -> Path | None:
        """The checkpoint's file."""
        return None if self.folder is None else self.folder / "checkpoint.safetensors"

    @torch.enable_grad()
    def run(self, resume: bool = False, overwrite: bool = False) -> list[Epoch]:
        """Trains, and puts the weights and encodings of the last epoch, or of the best, into the simulation.

        resume: continues from the checkpoint, if there is one. overwrite: not from that of another configuration, which
        is an error otherwise. Returns what was measured, epoch by epoch.
        Raises TrainingError when training diverges, FileFormatError for a checkpoint that cannot be used.
        """
        with self.training():
            if not (resume and self._continued(overwrite)):
                self._measure(None, 0.0)
                self._save()
            while self.epoch < self.config.epochs and not self._is_over():
                self._train_epoch()
        self._keep()
        return self.history

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within it the simulation computes with what is learned; sites that learn have no encoding of their own."""
        networks = (self.sim.model, self.network, *self.distillation.networks)
        for module in networks:
            _arrange(module, LAYOUT)
        self.norms.arrange(LAYOUT)
        try:
            with self.learning.computing():
                yield
        finally:
            for module in networks:
                _arrange(module, torch.contiguous_format)

    def _placed(self, batch: Batch) -> list[Tensor]:
        """The inputs of a batch, on the device."""
        placed = [sent(x, self.device) for x in inputs(batch)]
        return [x.to(memory_format=LAYOUT) if x.ndim == 4 else x for x in placed]

    def _train_epoch(self) -> None:
        started = time.monotonic()
        self.learning.active = schedule.active(self.learning.sites, self.config, self.epoch)
        saved = time.monotonic()
        before = self.seconds
        title = f"epoch {self.epoch + 1} of {self.config.epochs}"
        for batch, targets in self.progress.track(self.batches(), title, len(self.data.train) - self.batch):
            self.step(batch, targets)
            self.batch += 1
            self.seconds = before + time.monotonic() - started
            if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                self._save()
                saved = time.monotonic()
        self.losses.read()
        loss = self.losses.total / self.losses.samples if self.losses.samples else math.nan
        self.schedule.after_epoch(loss)
        self.processes.check_equal([*self.tensors, self.exponents.k, self.norms.statistics])
        self._measure(loss, before + time.monotonic() - started)
        self._check_accuracy()
        self.epoch, self.batch = self.epoch + 1, 0
        self.losses.total, self.losses.samples, self.seconds = 0.0, 0, 0.0
        self.flips.zero_()
        self._save()

    def batches(self) -> Iterator[tuple[Batch, Any]]:
        """The rest of the epoch's batches: those of `data.train`, always in the order that seed and epoch give."""
        generator = torch.get_rng_state() if self.batch else None
        _seed(self.seed, self.epoch)
        for index, batch in enumerate(self.data.train):
            if index == self.batch and generator is not None:
                torch.set_rng_state(generator)
                generator = None
            if index >= self.batch:
                yield batch

    def step(self, batch: Batch, targets: Any) -> None:
        """One step on a batch's inputs (N, …) and its targets, of which this process takes its share."""
        whole = inputs(batch)
        count, share = len(whole[0]), self.processes.share
        if count < self.processes.size:  # a user's own loader may end an epoch so
            return
        arguments = self._placed(tuple(share(x) for x in self.mixing.of(whole)))
        targets = pytree.tree_map(lambda t: sent(share(t), self.device) if isinstance(t, Tensor) else t, targets)
        self.optimizer.zero_grad()
        if self.exponent_optimizer is not None:
            self.exponent_optimizer.zero_grad()
        done = self.epoch * len(self.data.train) + self.batch
        live = done < self.config.freeze_batch_norm * self.steps
        with self._precision():
            with self.norms.on_batches(live):
                results = self.sim.model(*arguments)
            loss = self._loss(results, arguments, targets) * (len(arguments[0]) / count)
        self.scaler.scale(loss).backward()
        self.processes.sum_gradients([*self.tensors, *self.exponents.parameters()])
        if live:
            self.processes.average(self.norms.statistics)
        value = self.processes.summed(loss.detach().clone())
        if self.config.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.tensors, self.config.gradient_clip)
        with schedule.told("optimizer", self.config.optimizer), self.relative.applied():
            self.scaler.step(self.optimizer)
        if self.exponent_optimizer is not None and any(p.grad is not None for p in self.exponents.parameters()):
            self.scaler.step(self.exponent_optimizer)
        self.scaler.update()
        self.average.advance()
        self.norms.advance()
        self.schedule.after_step()
        self.losses.add(value, self.exponents.learned, count)
        self.flips += self.exponents.advance()
        if done + 1 >= self.config.freeze_exponents * self.steps and self.exponents.moving:
            self.exponents.freeze()

    def _loss(self, results: Any, arguments: list[Tensor], targets: Any) -> Tensor:
        share = self.config.distillation
        schedule.require_learnable(inputs(results)[0])
        loss = self.distillation.loss(inputs(results), arguments, targets)
        return loss if share == 1 else loss + (1 - share) * schedule.loss_of(self.criterion, results, targets)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.precision))

    def _check_accuracy(self) -> None:
        """Raises TrainingError when a classifier that could tell the classes apart only guesses any more."""
        if not self.classes:
            return
        before, now = self.history[0].accuracy, self.history[-1].accuracy
        limit = GUESSING * 100 / self.classes
        if now <= limit < before / 2:
            raise self._diverged(f"the accuracy has fallen from {before:.2f} % to {now:.2f} %")

    def _diverged(self, what: str, ago: int = 0) -> TrainingError:
        kept = f"; the last good checkpoint is {self.path}" if self.path is not None else ""
        return TrainingError(
            f"training has diverged in epoch {self.epoch + 1}, after {self.batch - ago} batches: {what}{kept}; "
            f"lower training.learning_rate ({self.config.learning_rate:g}) or set training.gradient_clip"
        )

    def accuracy(self) -> float:
        """The leading metric on the test data; every process measures all of it."""
        return judged(self.metric, self.sim.model, self.network, self.data.test, self.device)

    def _measure(self, loss: float | None, seconds: float) -> None:
        """Adds an epoch to the history; remembers it if it is the best of those in which everything was quantized."""
        epoch = 0 if loss is None else self.epoch + 1
        with self.average.taken():
            accuracy = self.accuracy()
            learned = [t.detach().clone() for t in self.learned] if self.config.keep == "best" else []
        moved = int((self.exponents.k != self.exponents.calibrated).sum())
        self.history.append(
            Epoch(
                epoch=epoch,
                loss=loss,
                accuracy=accuracy,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                quantized=len(self.active) / len(self.learning.whole),
                flips=int(self.flips),
                moved=moved,
                frozen=int(self.exponents.frozen.sum()),
                exponents=self.exponents.k.numel(),
                seconds=round(seconds, 2),
            )
        )
        if self.config.tensorboard and self.folder is not None and self.processes.leads:
            curves.log(self.folder, self.history[-1])
        if loss is not None:
            word = "accuracy" if self.metric.key == "accuracy" else self.metric.name
            shown = f"{word} {self.metric.text(accuracy)}"
            self.progress.note(f"epoch {epoch}: loss {loss:.4f}, {shown}, {moved} exponents moved")
        if self.active == self.learning.whole and (
            not self.best or self.metric.better(accuracy, self.best["accuracy"])
        ):
            self.best = {"accuracy": accuracy, "epoch": epoch} | ({"learned": learned} if learned else {})

    def _is_over(self) -> bool:
        """Whether training is to stop early."""
        patience = self.config.patience
        return patience is not None and self.epoch - max(self.best["epoch"], self._first_whole) >= patience

    @property
    def _first_whole(self) -> int:
        """The epochs before everything is quantized, which say nothing."""
        return self.config.warmup_epochs + self.config.gradual_epochs

    @property
    def learned(self) -> list[Tensor]:
        """Everything that the trained network follows from."""
        return [*self.tensors, self.norms.statistics, *self.exponents.learned]

    @torch.no_grad()
    def _keep(self) -> None:
        """Puts what is to be kept into the simulation: the last epoch's, or the best one's."""
        self.average.exchange()
        for tensor, value in zip(self.learned, self.best.get("learned", self.learned), strict=True):
            tensor.copy_(value)
        self.learning.settle()

    def _save(self) -> None:
        """Writes the checkpoint; the leading process does, as all are the same."""
        self.losses.read()
        if self.path is None or not self.processes.leads:
            return
        state = {
            "identity": self.identity,
            "parameters": self.tensors,
            "average": [self.average.steps, self.average.values],
            "statistics": self.norms.statistics,
            "exponents": self.exponents.state(),
            "optimizers": [o.state_dict() for o in (self.optimizer, self.exponent_optimizer) if o is not None],
            "schedule": self.schedule.state(),
            "scaler": self.scaler.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
            "best": self.best,
            "place": [self.epoch, self.batch],
            "sums": [
                self.losses.total,
                self.losses.samples,
                int(self.flips),
                self.seconds,
                self.losses.smoothed,
                self.losses.first,
            ],
            "generator": torch.get_rng_state(),
        }
        checkpoint.dump(self.path, state)

    def _continued(self, overwrite: bool) -> bool:
        """Whether there was a checkpoint to continue from."""
        if self.path is None or not self.path.is_file():
            return False
        try:
            self._restore(checkpoint.load(self.path))
        except ConfigError:
            if overwrite:
                return False
            raise
        self.progress.note(f"resumed at epoch {self.epoch + 1}, batch {self.batch}")
        return True

    def _restore(self, state: Any) -> None:
        """Raises ConfigError for a training of another configuration, FileFormatError for what is no training's."""
        try:
            self._take(state)
        except Pow2QuantError:
            raise
        except Exception as error:  # a foreign state fails in every way there is
            reason = " ".join(str(error).split())[:200]
            raise FileFormatError(
                f"{self.path}: not a checkpoint of this training ({type(error).__name__}: {reason}); "
                "start anew with --overwrite"
            ) from error

    @torch.no_grad()
    def _take(self, state: dict[str, Any]) -> None:
        if state["identity"] != self.identity:
            raise ConfigError(f"{self.path}: {checkpoint.difference(state['identity'], self.identity)}")
        for tensor, value in zip(self.tensors, state["parameters"], strict=True):
            tensor.copy_(value)
        self.average.restore(*state["average"])
        self.norms.statistics.copy_(state["statistics"])
        self.exponents.restore(state["exponents"])
        optimizers = [o for o in (self.optimizer, self.exponent_optimizer) if o is not None]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.schedule.restore(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.best = state["best"]
        self.epoch, self.batch = state["place"]
        self.losses.total, self.losses.samples, flips, self.seconds, *smoothed = state["sums"]
        self.losses.smoothed, self.losses.first = smoothed
        self.flips.fill_(flips)
        torch.set_rng_state(state["generator"])


def _arrange(module: nn.Module, layout: torch.memory_format) -> None:
    """Lays out all weights of images in memory; `Module.to` refuses those of volumes."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def _seed(seed: int, epoch: int) -> None:
    """Seeds every generator that data may use, for one epoch."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 (what data sets of users draw from)
    torch.manual_seed(mixed)
