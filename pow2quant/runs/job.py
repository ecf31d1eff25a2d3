"""What a configuration stands for: a float network, its preparation, its data and its simulation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from pow2quant import config as configuration
from pow2quant import datasets, models
from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import QuantPlan, RunConfig
from pow2quant.errors import ConfigError, DataError
from pow2quant.frontends.prepare import is_prepared, prepare
from pow2quant.plugins import resolve

T = TypeVar("T")


Named = list[tuple[str, Any]]


def simulate(network: nn.Module, example: Batch, plan: QuantPlan | None = None, backend: str = "custom") -> Simulation:
    """A quantized simulation of a network: prepared, batch norm folded, wrapped by the backend; not yet calibrated.

    network: any traceable module (left unchanged), or what `prepare` returned. example: inputs of one call, (N, …).
    """
    be_exact()
    prepared = network if isinstance(network, fx.GraphModule) and is_prepared(network) else prepare(network, example)
    folded = fold_batch_norm(copy.deepcopy(prepared))
    sim: Simulation = resolve("backends", backend)(folded, example, plan or QuantPlan.default())
    return sim


@dataclass
class Job:
    """What a configuration stands for: a float network, its preparation, and data."""

    config: RunConfig
    data: datasets.Data
    model: nn.Module
    network: fx.GraphModule
    example: Batch
    progress: Progress
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def start(cls, config: RunConfig, progress: Progress) -> Job:
        """Loads data and network, prepares. The configuration is resolved on the way."""
        be_exact()
        device = device_of(config.device)
        torch.manual_seed(config.seed)
        config = _absolute(replace(config, data=datasets.resolved(config.data)))
        data = datasets.load(config.data, config.training.batch_size)
        model = models.build(config.model.name, num_classes=config.model.num_classes, weights=config.model.weights)
        if config.model.name == "digits-cnn" and config.model.weights is None:
            _weights_of_digits(model, config, data, progress)
        example = next((images[:1] for images, _ in data.calibration), None)
        if example is None:
            raise DataError("the calibration data are empty")
        calibration = Images(data.calibration, config.ptq.calibration_batches)
        network = float_network(model, example, config, calibration, progress)
        return cls(config, data, model.float().eval(), network, example, progress, device)

    def simulate(self) -> Simulation:
        """The backend's simulation of the prepared network, on the device."""
        sim = simulate(self.network, self.example, configuration.plan_of(self.config), self.config.backend)
        sim.model.to(self.device)
        self.model.to(self.device)
        return sim

    def quantized(self) -> Simulation:
        """The simulation, calibrated and behind its methods."""
        sim = self.simulate()
        sim.calibrate(self.progress.track(self.calibration(), "calibrating", len(self.calibration())))
        for _, method in methods_of(self.config)[1]:
            call(method.apply, sim, self.calibration(), progress=self.progress)
        return sim

    @property
    def steps(self) -> list[str]:
        """What leads to `quantized`, by name."""
        rewrites, methods = methods_of(self.config)
        return [*(name for name, _ in rewrites), "calibrate", *(name for name, _ in methods)]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Top-1 of the network or of a simulation's model on the test data, in per cent."""
        right = total = 0
        size = min(len(self.data.test), self.config.ptq.max_eval_batches or len(self.data.test))
        for images, labels in self.progress.track(islice(self.data.test, size), "evaluating", size):
            right += int((model(images.to(self.device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
        return round(100 * right / total, 4)

    def parameters(self, sim: Simulation) -> dict[str, Tensor]:
        """The network's own parameters and buffers in the simulation, by name (a backend may have further ones)."""
        own = self.network.state_dict()
        found = chain(
            sim.model.named_parameters(remove_duplicate=False), sim.model.named_buffers(remove_duplicate=False)
        )
        return {name: tensor for name, tensor in found if name in own}

    def calibration(self) -> Images:
        """The calibration images, batch by batch."""
        return Images(self.data.calibration, self.config.ptq.calibration_batches)

    def test(self, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images and labels, batch by batch."""
        total = min(len(self.data.test), limit or len(self.data.test))
        return self.progress.track(islice(self.data.test, total), "evaluating all executors", total)


def methods_of(config: RunConfig) -> tuple[Named, Named]:
    """The rewrites and the methods that a configuration names, in order.

    Raises ConfigError for a parameter that one does not have, and for a rewrite behind a method.
    """
    rewrites: Named = []
    methods: Named = []
    for name, values in config.ptq.methods or ():
        made = configuration.parameters(resolve("methods", name), values, f"ptq.methods.{name}")
        if not hasattr(made, "rewrite"):
            methods.append((name, made))
        elif methods:
            raise ConfigError(f"ptq.methods: {name} rewrites the float network; put it before {methods[0][0]}")
        else:
            rewrites.append((name, made))
    return rewrites, methods


def call(step: Callable[..., T], subject: Any, batches: Iterable[Batch], **offered: Any) -> T:
    """`apply` or `rewrite`, with what it takes of `offered`."""
    taken = inspect.signature(step).parameters
    return step(subject, batches, **{key: value for key, value in offered.items() if key in taken})


def float_network(
    model: nn.Module, example: Batch, config: RunConfig, batches: Iterable[Batch], progress: Progress = SILENT
) -> fx.GraphModule:
    """The network that is simulated: prepared, batch norm folded, rewritten."""
    network = fold_batch_norm(prepare(model, example))
    plan = configuration.plan_of(config)
    for _, rewrite in methods_of(config)[0]:
        network = call(rewrite.rewrite, network, batches, progress=progress, plan=plan)
    return network


@dataclass(frozen=True)
class Images:
    """The images of the first `limit` batches (None: all), again and again."""

    batches: datasets.Batches
    limit: int | None

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in islice(self.batches, self.limit))

    def __len__(self) -> int:
        return min(len(self.batches), self.limit or len(self.batches))


def _weights_of_digits(model: nn.Module, config: RunConfig, data: datasets.Data, progress: Progress) -> None:
    """Loads the shipped weights for the data they were trained on; for other data, trains the network here."""
    if config.data.dataset == "digits" and config.model.num_classes in (None, 10):
        models.load_weights(model, models.DIGITS_WEIGHTS)
        return
    progress.note("training the embedded digits network on other data (a few seconds)")
    models.train_digits(model, data, seed=config.seed)


def _absolute(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, so that the run can be repeated from any folder."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name else name

    def own(name: str) -> str:
        return str(absolute(name)) if configuration.is_in_file(name) else name

    def chosen(choice: configuration.Choice | None) -> Any:
        return choice and choice._replace(name=own(choice.name))

    model = replace(config.model, name=own(config.model.name), weights=absolute(config.model.weights))
    t = config.training
    parts = {"criterion": chosen(t.criterion), "optimizer": chosen(t.optimizer), "scheduler": chosen(t.scheduler)}
    return replace(
        config,
        model=model,
        training=replace(t, **parts),
        data=replace(config.data, dataset=own(config.data.dataset), path=absolute(config.data.path)),
        search=replace(config.search, latency_table=absolute(config.search.latency_table)),
    )


def device_of(name: str) -> torch.device:
    """Raises ConfigError for a device that is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"device: {name!r} cannot be used here: {reason}") from error
    return device


def be_exact() -> None:
    """Deterministic, no reduced precision, and sums of products only (NNPACK's Winograd computes others)."""
    torch.backends.nnpack.set_flags(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
