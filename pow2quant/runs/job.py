"""What a configuration stands for: a float network, its preparation, its data and its simulation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from pow2quant import config as configuration
from pow2quant import datasets, models, targets
from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.calibration import settled
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.backends.pixels import fold_normalization
from pow2quant.backends.sums import separate
from pow2quant.config import QuantPlan, RunConfig
from pow2quant.datasets.sampling import Sample, labels_at_hand, sample
from pow2quant.errors import ConfigError, DataError, ModelError
from pow2quant.frontends.batches import call_arguments, inputs
from pow2quant.frontends.copies import copied
from pow2quant.frontends.export import first_line, unwrapped
from pow2quant.frontends.fixed import InParts
from pow2quant.frontends.kept import MOVES
from pow2quant.frontends.modules import ArgMax, Hardsigmoid, Places, Real, Sigmoid
from pow2quant.frontends.operators import called as called_by
from pow2quant.frontends.prepare import fixed_batch, prepare, unrolled
from pow2quant.methods.auto import Trial
from pow2quant.plugins import names, resolve
from pow2quant.reading import Batches, Checked
from pow2quant.runs.calling import Flat, first_call
from pow2quant.runs.computing import be_exact, device_of
from pow2quant.runs.pixels import Normalizing, Pixels, take_bytes
from pow2quant.runs.unfinished import NOTHING as NOTHING_KEPT
from pow2quant.runs.unfinished import Unfinished, digest_of, fingerprint_of
from pow2quant.tasks.base import Counter, Metric, Task
from pow2quant.tasks.choosing import task_of, unread
from pow2quant.tasks.judging import counted, leading, value_of

T = TypeVar("T")
Network = TypeVar("Network", bound=configuration.TeacherConfig)


Named = list[tuple[str, Any]]


def simulation_of(prepared: fx.GraphModule, example: Batch, plan: QuantPlan, backend: str) -> Simulation:
    """The backend's simulation of a prepared network, which stays as it is: batch norm folded, not yet calibrated."""
    be_exact()  # after torch.export, which sets cuDNN's precision
    folded = fold_batch_norm(copied(prepared))
    if plan.sums is not None:
        separate(folded)
    sim: Simulation = resolve("backends", backend)(folded, example, plan)
    return sim


@dataclass(frozen=True)
class Given:
    """What is handed over as an object, in place of what a configuration names; None: what it names.

    data: in a form that `sources` knows. methods: rewrites and methods in order. metric: what `tasks.own` takes.
    """

    model: nn.Module | None = None
    data: Any = None
    methods: Sequence[Any] | None = None
    metric: Any = None


NOTHING = Given()
"""All is as the configuration says."""


@dataclass
class Job:
    """What a configuration stands for: a float network, its preparation, and data.

    model: as the user wrote it, called with a flat sequence of tensors. example: inputs of one call, of one sample.
    flattened: makes of a network that is called as the user's is one that is called as `model` is.
    seen: calibration batches in place of those of `data`. trials: by which the methods were chosen, if they were.
    unfinished: where simulations on their way are kept.
    """

    config: RunConfig
    data: datasets.Data
    model: nn.Module
    network: fx.GraphModule
    example: Batch
    task: Task
    progress: Progress
    flattened: Callable[[nn.Module], nn.Module]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    given: Given = NOTHING
    samples: dict[int | None, Sample] = field(default_factory=dict)
    seen: Sequence[Batch] | None = None
    trials: tuple[Trial, ...] = ()
    unfinished: Unfinished = NOTHING_KEPT

    @classmethod
    def start(cls, config: RunConfig, progress: Progress, given: Given = NOTHING) -> Job:
        """Loads data and network, prepares. The configuration is resolved on the way."""
        device = device_of(config.device)
        if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            raise ConfigError("torch.autocast is on; leave its block first: networks are quantized from float32")
        config, data, model = loaded(config, progress, given)
        return cls.of(config, data, model, progress, given, device)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        data: datasets.Data,
        model: nn.Module,
        progress: Progress,
        given: Given = NOTHING,
        device: torch.device | None = None,
        batches: int | None = None,
    ) -> Job:
        """The job of a float network (in eval mode, on the CPU) and its data.

        batches: rewrites see at most so many; None: all that calibrate.
        """
        data, called, shapes, targets = first_call(model, data)
        metric = given.metric or config.metric
        several = isinstance(targets, tuple) and len(shapes[1]) == 1 and not (metric or config.training.criterion)
        first = targets[0] if several else targets
        task = task_of(config.task, metric, first, shapes[1])
        if several and task.name != "none":
            progress.note(f"targets: the first of {len(targets)} is used")
            data = replace(data, num_classes=0, class_names=())
        check = _check_of(task, several)
        data = data.with_parts(lambda part: replace(part, check=check, shapes=shapes[0]))
        outputs = shapes[1][0][-1] if shapes[1][0] else 1
        if task.name == "classification" and not several and outputs > 1:
            _check_labels(data, outputs)
        pixels = Pixels.of(config) if config.data.input == "pixels" else None
        data = data if pixels is None else pixels.data(data)
        calibration = Images(data.calibration, batches or config.ptq.calibration_batches)
        network = rewritten(prepared_network(model, called, config), config, calibration, progress, given)
        probable, classes = _gives_probabilities(network), _named_classes(network)
        if probable or classes:
            task = task_of(config.task, metric, first, shapes[1], probable, classes)
            check = _check_of(task, several)
            data = data.with_parts(lambda part: replace(part, check=check))
        if task.name == "none" and config.task is None and targets is not None:
            warning = unread(first, shapes[1], cast(Checked, data.test).name)
            progress.note(f"warning: {warning}")
            data = replace(data, warnings=(*data.warnings, warning))
        if task.name == "classification" and not several and outputs == 1:  # one logit, or the class itself
            _check_labels(data, classes or 2)
        for name, steps in unrolled(network).items():
            progress.note(f"{name}: unrolled over {steps} steps, the length of the inputs; it takes no other length")
        flat = inputs(called)
        example = flat[0] if len(flat) == 1 else flat
        if size := fixed_batch(network):
            progress.note(
                f"the network takes batches of {size} only: it is called part by part; quantized it takes any"
            )
        flattened = partial(_flattened, called=called, size=size, pixels=pixels)
        device = device or torch.device("cpu")
        return cls(config, data, flattened(model), network, example, task, progress, flattened, device, given)

    def teacher(self) -> nn.Module | None:
        """The network of `training.teacher`, on the device, called as `model` is; None where none is named.

        To be asked for before `simulate`, while `model` is on the CPU.

        Raises ConfigError where nothing is learned from it, ModelError for one whose first result has not the shape of
        the float network's.
        """
        training = self.config.training
        if training.teacher is None:
            return None
        if not training.distillation:
            raise ConfigError("training.teacher: needs training.distillation above 0, its share of the loss")
        name, example = training.teacher.name, inputs(self.example)
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # what PTQ draws does not depend on the teacher
            teacher = self.flattened(unwrapped(_built(training.teacher)))
            try:
                shapes = [tuple(inputs(network(*example))[0].shape) for network in (self.model, teacher)]
            except Exception as error:  # whatever somebody's network raises
                reason = first_line(error)
                raise ModelError(f"training.teacher: {name} fails on a sample of the data: {reason}") from error
        if shapes[0] != shapes[1]:
            raise ModelError(f"training.teacher: {name} gives {shapes[1]} for a sample; the network gives {shapes[0]}")
        return teacher.to(self.device)

    def simulate(self) -> Simulation:
        """The backend's simulation of the prepared network, on the device."""
        sim = simulation_of(self.network, self.example, configuration.plan_of(self.config), self.config.backend)
        sim.model.to(self.device)
        self.model.to(self.device)
        return sim

    def quantized(self, name: str = "simulation") -> Simulation:
        """The simulation, calibrated and behind its methods. name: under which it is kept on its way there."""
        sim, methods = self.simulate(), methods_of(self.config, self.given)[1]
        kept = self.unfinished.simulation(name, self.fingerprint, self.parameters)
        if kept.restore(sim):
            self.progress.note(f"continued: {kept.methods} of {len(methods)} methods are done, {kept.parts} parts more")
        else:
            sim.calibrate(self.progress.track(self.calibration(), "calibrating", len(self.calibration())))
            if self.config.data.input == "pixels":
                take_bytes(sim, self.network)
        for _, method in methods[kept.methods :]:
            with torch.enable_grad():  # some methods learn
                call(method.apply, sim, self.calibration(), progress=self.progress, marks=kept)
            kept.next_method(sim)
        if sim.placement.target.limits.bound_exponents:
            sim.load(settled(sim, sim.encodings()))
        return sim

    def fingerprint(self) -> str:
        """What the simulation depends on: the configuration, the network, the calibration images."""
        texts = configuration.dump(self.config), repr(self.given.methods), str(self.device), str(self.network)
        images = (x for batch in self.calibration() for x in inputs(batch))
        return fingerprint_of(texts, chain(self.network.state_dict().values(), images))

    def identity(self) -> str:
        """The configuration, the network and the data, in lines: a training goes on where all are the same.

        Of the data what calibrates counts, the first batch of what evaluates, and the labels that are at hand.
        """
        network = digest_of([str(self.network)], self.network.state_dict().values())
        tests = (x for batch in islice(self.data.test, 1) for x in tree_leaves(batch) if isinstance(x, Tensor))
        images = (x for batch in self.calibration() for x in inputs(batch))
        labels = (labels_at_hand(cast(Checked, part)) for part in (self.data.calibration, self.data.train))
        known = (torch.as_tensor(own) for own in labels if own is not None)
        data = digest_of([], chain(images, tests, known))
        return f"{configuration.dump(self.config)}network: {network}\ndata: {data}\n"

    def origin(self) -> str:
        """A digest of the float network's weights."""
        return digest_of([], self.model.state_dict().values())

    @property
    def steps(self) -> list[str]:
        """What leads to `quantized`, by name."""
        rewrites, methods = methods_of(self.config, self.given)
        return [*(name for name, _ in rewrites), "calibrate", *(name for name, _ in methods)]

    def score(self, model: nn.Module, metric: Metric | None = None) -> float:
        """A metric of the network or of a simulation's model on the test data; None: the task's leading one.

        Without targets that is the SQNR of its first output against the float network's, in dB.
        """
        metric = metric or leading(self.task)
        return value_of(metric, self.counted(model, metric))

    def counted(self, model: nn.Module, metric: Metric) -> Counter:
        """The metric's counter behind the test data."""
        tests = self.sample(self.config.ptq.max_eval_batches).batches
        batches = self.progress.track(tests, "evaluating", len(tests))
        return counted(metric, model, self.model, batches, self.device)

    def parameters(self, sim: Simulation) -> dict[str, Tensor]:
        """The network's own parameters and buffers in the simulation, by name (a backend may have further ones)."""
        own = self.network.state_dict()
        found = chain(
            sim.model.named_parameters(remove_duplicate=False), sim.model.named_buffers(remove_duplicate=False)
        )
        return {name: tensor for name, tensor in found if name in own}

    def calibration(self) -> Sequence[Batch] | Images:
        """The calibration images, batch by batch."""
        return Images(self.data.calibration, self.config.ptq.calibration_batches) if self.seen is None else self.seen

    def test(self, limit: int | None) -> Iterator[tuple[Batch, Any]]:
        """Test inputs and targets, batch by batch; of so many batches, a stratified sample."""
        tests = self.sample(limit).batches
        return self.progress.track(tests, "evaluating all executors", len(tests))

    def sample(self, limit: int | None) -> Sample:
        """The test data, or a sample as large as so many batches: the same in every evaluation."""
        if limit not in self.samples:
            self.samples[limit] = sample(cast(Checked, self.data.test), limit)
        return self.samples[limit]


def loaded(config: RunConfig, progress: Progress, given: Given = NOTHING) -> tuple[RunConfig, datasets.Data, nn.Module]:
    """The resolved configuration, its data and its float network: all that its seed decides before calibration."""
    be_exact()
    torch.manual_seed(config.seed)
    config = absolute(replace(config, data=datasets.resolved(config.data)))
    data = datasets.load(config.data, config.training.batch_size, given.data)
    for line in (*data.notes, *(f"warning: {text}" for text in data.warnings)):
        progress.note(line)
    model = network_of(config, given)
    if given.model is None and config.model.name == "digits-cnn" and config.model.weights is None:
        _weights_of_digits(model, config, data, progress)
    return config, data, model


def _check_of(task: Task, several: bool) -> Callable[[Any, int, str], Any]:
    """How a task reads targets, or the first of several."""
    return partial(_check_first, task.check) if several and task.name != "none" else task.check


def _check_first(check: Callable[[Any, int, str], Any], targets: Any, samples: int, where: str) -> Any:
    """Of several targets, the first one as a task reads it."""
    return check(targets[0], samples, where)


def _gives_probabilities(network: fx.GraphModule) -> bool:
    """Whether the first output is that of a sigmoid, which may have been moved."""
    return isinstance(called_by(network, _last(network, *MOVES)), (Sigmoid, Hardsigmoid))


def _named_classes(network: fx.GraphModule) -> int:
    """Of how many classes the first output names one, as the place of the largest value; 0 where it does not."""
    last = _last(network, *MOVES, Real)
    module = called_by(network, last)
    if not (isinstance(module, ArgMax) or (isinstance(module, Places) and module.count == 1)):
        return 0
    size: int = last.all_input_nodes[0].meta["shape"][module.dim]
    return size


def _last(network: fx.GraphModule, *passed: type[nn.Module]) -> fx.Node:
    """The node whose values the first output has, behind modules of these types."""
    (output,) = (node for node in network.graph.nodes if node.op == "output")
    node: fx.Node = output.all_input_nodes[0]
    while isinstance(called_by(network, node), passed):
        node = node.all_input_nodes[0]
    return node


def _check_labels(data: datasets.Data, outputs: int) -> None:
    """Raises DataError for a label that the network cannot name, where the data have their labels at hand."""
    for part in (data.calibration, data.train, data.test):
        checked = cast(Checked, part)
        labels = labels_at_hand(checked)
        if labels is None or not ((labels < 0) | (labels >= outputs)).any():
            continue
        wrong = labels[(labels < 0) | (labels >= outputs)][0]
        raise DataError(
            f"{checked.name}: label {wrong} is no class of the network, which has {outputs} outputs; "
            f"legal: 0 to {outputs - 1}; if the targets are no classes, --task says what they are"
        )


def methods_of(config: RunConfig, given: Given = NOTHING) -> tuple[Named, Named]:
    """The rewrites and the methods that a configuration names, or that are given, in order.

    Raises ConfigError for a parameter that one does not have, for a rewrite behind a method, and for a method that does
    not work on weights with blocks where the plan has such.
    """
    rewrites: Named = []
    methods: Named = []
    named = [
        (name, configuration.parameters(resolve("methods", name), values, f"ptq.methods.{name}"))
        for name, values in (config.ptq.applied if given.methods is None else ())
    ]
    blocks = _asks_for_blocks(config)
    for name, made in named or [(type(each).__name__, each) for each in given.methods or ()]:
        if blocks and not _takes_blocks(made):
            raise ConfigError(
                f"ptq.methods: {name} does not work on weights with blocks (quantization.weight.block); those that do: "
                f"{', '.join(n for n in names('methods') if _takes_blocks(resolve('methods', n)))}"
            )
        if not hasattr(made, "rewrite"):
            methods.append((name, made))
        elif methods:
            raise ConfigError(f"ptq.methods: {name} rewrites the float network; put it before {methods[0][0]}")
        else:
            rewrites.append((name, made))
    return rewrites, methods


def _asks_for_blocks(config: RunConfig) -> bool:
    plan = configuration.plan_of(config)
    specs = [plan.weight, *(changes.get("weight") for _, changes in plan.overrides if changes)]
    return any(spec is not None and spec.block is not None for spec in specs)


def _takes_blocks(method: Any) -> bool:
    return hasattr(method, "rewrite") or getattr(method, "takes_blocks", False)


def call(step: Callable[..., T], subject: Any, batches: Iterable[Batch], **offered: Any) -> T:
    """`apply` or `rewrite`, with what it takes of `offered`."""
    taken = inspect.signature(step).parameters
    return step(subject, batches, **{key: value for key, value in offered.items() if key in taken})


def prepared_network(model: nn.Module, example: Any, config: RunConfig) -> fx.GraphModule:
    """The network, prepared, batch norm folded; the normalization too where it takes pixels."""
    network = fold_batch_norm(prepare(model, example))
    if config.data.input == "pixels":
        how = Pixels.of(config)
        network = fold_normalization(network, how.mean, how.std, how.white)
    return network


def rewritten(
    network: fx.GraphModule,
    config: RunConfig,
    batches: Iterable[Batch],
    progress: Progress = SILENT,
    given: Given = NOTHING,
) -> fx.GraphModule:
    """The network that is simulated: a prepared one behind its rewrites, in place."""
    plan = configuration.plan_of(config)
    for _, rewrite in methods_of(config, given)[0]:
        network = call(rewrite.rewrite, network, batches, progress=progress, plan=plan)
    return network


def network_of(config: RunConfig, given: Given = NOTHING) -> nn.Module:
    """The float network, float32 on the CPU and in eval mode; one that is given stays as it was."""
    if given.model is not None:
        models.check_finite(given.model.state_dict(), config.model.name)
        return unwrapped(given.model)
    return unwrapped(_built(config.model))


def _built(model: configuration.TeacherConfig) -> nn.Module:
    return models.build(model.name, num_classes=model.num_classes, weights=model.weights)


def _flattened(model: nn.Module, called: Any, size: int | None, pixels: Pixels | None) -> nn.Module:
    """A network called with a flat sequence of tensors: size samples at a time, from pixels, where these are given."""
    own = model if isinstance(called, Tensor) and not call_arguments(model, called)[1] else Flat(model, called)
    own = InParts(own, size) if size else own
    return own if pixels is None else Normalizing(own, pixels)


@dataclass(frozen=True)
class Images:
    """The inputs of the first `limit` batches (None: all), again and again."""

    batches: Batches
    limit: int | None

    def __iter__(self) -> Iterator[Batch]:
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


def absolute(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, so that the run can be repeated from any folder."""

    def whole(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name else name

    def own(name: str) -> str:
        in_file = configuration.is_in_file(name) or Path(name).suffix in (".onnx", ".npz", ".npy")
        return str(whole(name)) if in_file else name

    def chosen(choice: configuration.Choice | None) -> Any:
        return choice and choice._replace(name=own(choice.name))

    def network(model: Network) -> Network:
        return replace(model, name=own(model.name), weights=whole(model.weights))

    t = config.training
    parts: dict[str, Any] = {key: chosen(getattr(t, key)) for key in ("criterion", "optimizer", "scheduler")}
    parts |= {"teacher": t.teacher and network(t.teacher)}
    return replace(
        config,
        metric=config.metric and own(config.metric),
        model=network(config.model),
        training=replace(t, **parts),
        data=replace(config.data, dataset=own(config.data.dataset), path=whole(config.data.path)),
        search=replace(config.search, latency_table=whole(config.search.latency_table)),
        target=str(whole(config.target)) if targets.is_file(config.target) else config.target,
    )
