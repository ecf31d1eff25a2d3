"""From a configuration to a run's folder: calibrate, snap, export, validate from the files, report."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, fx, nn

from pow2quant import config as configuration
from pow2quant import datasets, models, run_folder
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.artifact import Agreement, Artifact, Site, Table
from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.base import inputs as arguments
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.backends.prepare import is_prepared, prepare
from pow2quant.backends.samples import sample
from pow2quant.config import QuantPlan, RunConfig
from pow2quant.errors import (
    ConfigError,
    DataError,
    FileFormatError,
    MissingExtraError,
    NotPowerOfTwoError,
    OutputError,
    UnsupportedModelError,
)
from pow2quant.integer.certificate import Certificate, certify
from pow2quant.plugins import names, resolve
from pow2quant.report import document, statistics
from pow2quant.report.html import page_of
from pow2quant.report.network import describe
from pow2quant.validation import latency, ort
from pow2quant.validation.agreement import Executor, compare

T = TypeVar("T")
Arrays = Sequence[NDArray[np.float32]]

RANDOM_SAMPLES = 64
"""How many random inputs a bare ONNX file is validated on."""

PATIENCE = 200_000_000_000
"""Multiply-accumulates that `ptq` gives to each of the slow executors, about a minute; `validate` gives them all."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, what report.json holds, and whether every executor agreed."""

    folder: Path
    report: dict[str, Any]
    agreements: tuple[Agreement, ...]

    @property
    def agrees(self) -> bool:
        """Whether not a single element differs."""
        return all(a.agrees for a in self.agreements)


@dataclass(frozen=True)
class Validation:
    """What validating a run's folder or a file found.

    free_scales: (tensor, scale) of the tensors whose scales are no powers of two. certificate: what is proved.
    left_out: why an executor could not take part, by its name.
    """

    agreements: tuple[Agreement, ...]
    free_scales: list[tuple[str, float]]
    certificate: Certificate
    left_out: dict[str, str]

    @property
    def agrees(self) -> bool:
        """Whether not a single element differs."""
        return all(a.agrees for a in self.agreements)

    @property
    def certificate_sentence(self) -> str:
        """The certificate in one line."""
        return self.certificate.sentence


def simulate(network: nn.Module, example: Batch, plan: QuantPlan | None = None, backend: str = "custom") -> Simulation:
    """A quantized simulation of a network: prepared, batch norm folded, wrapped by the backend; not yet calibrated.

    network: any traceable module (left unchanged), or what `prepare` returned. example: inputs of one call, (N, …).
    """
    _be_exact()
    prepared = network if isinstance(network, fx.GraphModule) and is_prepared(network) else prepare(network, example)
    folded = fold_batch_norm(copy.deepcopy(prepared))
    sim: Simulation = resolve("backends", backend)(folded, example, plan or QuantPlan.default())
    return sim


def ptq(config: RunConfig, output: Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Result:
    """Post-training quantization from a configuration to a run's folder.

    Raises Pow2QuantError for everything that a user can mend; then `output` is as it was before.
    """
    started = time.monotonic()
    with run_folder.staged(output, overwrite) as folder:
        job, sim, steps = quantized(config, progress)
        report, agreements = finish(job, sim, folder, [*steps, "export"])
        report["ptq_accuracy"] = report["final_accuracy"]
        report["duration_seconds"] = round(time.monotonic() - started, 2)
        write_report(folder, report)
    return Result(output, report, tuple(agreements))


def quantized(config: RunConfig, progress: Progress) -> tuple[Job, Simulation, list[str]]:
    """The first part of every run: what a configuration stands for, its calibrated simulation, and the steps taken."""
    if config.ptq.methods is None:
        config = replace(config, ptq=replace(config.ptq, methods=configuration.default_methods(config)))
    _methods(config)
    job = Job.start(config, progress)
    return job, job.quantized(), job.steps


def score(config: RunConfig, progress: Progress = SILENT) -> dict[str, Any]:
    """Quantizes as `ptq` does and evaluates the simulation on the test data; nothing is written or validated.

    Returns keys of report.json: `backend`, `pipeline_steps`, the accuracies of the float network (`initial_…`) and of
    the simulation (`final_…`), `final_sqnr_db` and `evaluated_samples`.
    """
    job, sim, steps = quantized(config, progress)
    scores = _Scores()
    simulation = scores.watch(simulation_executor(sim, config.backend, job.device), noise=True)
    for batch in scores.stream(job.test(config.ptq.max_eval_batches), _runner(job.model, job.device)):
        simulation.run(batch)
    return (
        {"backend": config.backend, "pipeline_steps": steps}
        | _accuracies(scores, initial="float", final=simulation.name)
        | {
            "final_sqnr_db": scores.sqnr_db,
            "evaluated_samples": scores.samples,
        }
    )


def _accuracies(scores: _Scores, **executors: str) -> dict[str, float | None]:
    """`<key>_accuracy` of executors by key; top-5 too, where there are more than 5 classes."""
    found = {f"{key}_accuracy": scores.accuracy(name) for key, name in executors.items()}
    if scores.classes > 5:
        found |= {f"{key}_accuracy_top5": scores.accuracy(name, 5) for key, name in executors.items()}
    return found


def reopened(folder: Path, config: RunConfig | None = None, progress: Progress = SILENT) -> tuple[Job, Simulation]:
    """A finished run as it was when it was quantized: its data, its float network, its simulation.

    config: in place of the run's own. Raises FileFormatError where the folder holds no run that fits it.
    """
    if not (folder / run_folder.STATE).is_file():
        raise FileFormatError(f"{folder}: holds no {run_folder.STATE}; give the folder of a finished run")
    parameters, table = run_folder.load_state(folder / run_folder.STATE)
    job = Job.start(config or configuration.load(folder / run_folder.CONFIG), progress)
    sim = job.simulate()
    _load_parameters(job.parameters(sim), parameters, folder / run_folder.STATE)
    sim.load(table)
    return job, sim


def responses(
    job: Job, sim: Simulation, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]:
    """Labels (N,), and the logits of the float network and of the simulation, (N, classes), batch by batch."""
    exact, quantized = _runner(job.model, job.device), _runner(sim.model, job.device)
    for images, labels in batches:
        inputs = [images.numpy()]
        yield labels.numpy(), exact(inputs)[0], quantized(inputs)[0]


def validate(
    source: Path,
    *,
    encodings: Path | None = None,
    config: RunConfig | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Validation:
    """Runs every executor of a run's folder on its test data, or those of an ONNX file on random inputs.

    source: a run's folder, or a QDQ ONNX file (or a float one, with `encodings`). config: in place of the run's own,
    where its data or its device are elsewhere now.
    """
    if source.is_dir():
        config = config or configuration.load(source / run_folder.CONFIG)
        return _validate_run(source, config, encodings, max_batches, progress)
    if config is not None:
        raise ConfigError(f"{source}: a configuration (or a device) is for the folder of a run, not for a file")
    if not source.is_file():
        raise FileFormatError(f"{source}: no such file or folder")
    model = onnx_qdq.load(source)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantized == (encodings is not None):
        raise FileFormatError(
            f"{source}: has QuantizeLinear nodes already; give a float model with --encodings"
            if quantized
            else f"{source}: has no QuantizeLinear; give its --encodings, or the folder of a run"
        )
    if encodings is not None:
        table = aimet_encodings.load(encodings, aimet_encodings.channel_axes(model))
        model = onnx_qdq.to_qdq(aimet_encodings.apply(model, table))
    with tempfile.TemporaryDirectory() as folder:
        file = source
        if encodings is not None:
            file = Path(folder) / run_folder.QDQ
            onnx_qdq.save(model, file)
        return _validate_file(file, model, max_batches, seed, progress)


def _validate_file(file: Path, model: ModelProto, max_batches: int | None, seed: int, progress: Progress) -> Validation:
    artifact = onnx_qdq.from_qdq(model)
    certificate = certify(artifact)
    samples = max_batches * ort.BATCH if max_batches else RANDOM_SAMPLES
    batches = list(ort.random_batches(model, samples, seed))
    left_out: dict[str, str] = {}
    reference, *others = executors(file, None, left_out)
    found = compare(reference, others, progress.track(batches, "comparing", len(batches)), artifact, proof=certificate)
    return Validation(tuple(found), ort.inspect(model), certificate, left_out)


def executors(file: Path, pair: tuple[Path, Path] | None, left_out: dict[str, str]) -> list[Executor]:
    """Every validator's executors of a QDQ file and of a pair; into `left_out` go the reasons of those that cannot."""
    found: list[Executor] = []
    for name in names("validators"):
        try:
            found += resolve("validators", name)(file, pair)
        except (MissingExtraError, NotPowerOfTwoError, UnsupportedModelError) as error:
            left_out[name] = str(error)
    return found


def export(source: Path, form: str, output: Path | None = None, *, overwrite: bool = False) -> list[Path]:
    """Writes a finished run in a further format, into `output` or `<run>/export/<form>`. Returns what was written.

    Raises OutputError when that folder holds something and `overwrite` is not set.

    source: a run's folder; or an encodings file, which becomes `<output>/<its name>` in another version (`output` then
    defaults to `<its folder>/<form>`).
    """
    exporter: Callable[[Artifact, Path], Path] = resolve("exporters", form)
    if source.is_file():
        if not form.startswith("aimet-"):
            raise ConfigError(f"{source}: an encodings file alone can only become aimet-VERSION, not {form!r}")
        folder = _free(output or source.parent / form, overwrite)
        return [aimet_encodings.convert(source, form.removeprefix("aimet-"), folder / source.name)]
    if not (source / run_folder.QDQ).is_file():
        raise FileFormatError(f"{source}: holds no {run_folder.QDQ}; give the folder of a finished run")
    artifact = onnx_qdq.from_qdq(onnx_qdq.load(source / run_folder.QDQ))
    return [exporter(artifact, _free(output or source / "export" / form, overwrite))]


def _free(folder: Path, overwrite: bool) -> Path:
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder}: holds something already; choose another --output, or add --overwrite")
    return folder


Named = list[tuple[str, Any]]


def _methods(config: RunConfig) -> tuple[Named, Named]:
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


def _call(step: Callable[..., T], subject: Any, batches: Iterable[Batch], **offered: Any) -> T:
    """`apply` or `rewrite`, with what it takes of `offered`."""
    taken = inspect.signature(step).parameters
    return step(subject, batches, **{key: value for key, value in offered.items() if key in taken})


def _float_network(
    model: nn.Module, example: Batch, config: RunConfig, batches: Iterable[Batch], progress: Progress = SILENT
) -> fx.GraphModule:
    """The network that is simulated: prepared, batch norm folded, rewritten."""
    network = fold_batch_norm(prepare(model, example))
    plan = configuration.plan_of(config)
    for _, rewrite in _methods(config)[0]:
        network = _call(rewrite.rewrite, network, batches, progress=progress, plan=plan)
    return network


@dataclass(frozen=True)
class _Images:
    """The images of the first `limit` batches (None: all), again and again."""

    batches: datasets.Batches
    limit: int | None

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in islice(self.batches, self.limit))

    def __len__(self) -> int:
        return min(len(self.batches), self.limit or len(self.batches))


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
        """Loads data and network, trains the embedded default, prepares. The configuration is resolved on the way."""
        _be_exact()
        device = _device(config.device)
        torch.manual_seed(config.seed)
        config = _absolute(replace(config, data=datasets.resolved(config.data)))
        data = datasets.load(config.data, config.training.batch_size)
        model = models.build(config.model.name, num_classes=config.model.num_classes, weights=config.model.weights)
        if config.model.name == "digits-cnn" and config.model.weights is None:
            progress.note("training the embedded digits network (a few seconds)")
            models.train_digits(model, data, seed=config.seed)
        example = next((images[:1] for images, _ in data.calibration), None)
        if example is None:
            raise DataError("the calibration data are empty")
        calibration = _Images(data.calibration, config.ptq.calibration_batches)
        network = _float_network(model, example, config, calibration, progress)
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
        for _, method in _methods(self.config)[1]:
            _call(method.apply, sim, self.calibration(), progress=self.progress)
        return sim

    @property
    def steps(self) -> list[str]:
        """What leads to `quantized`, by name."""
        rewrites, methods = _methods(self.config)
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

    def calibration(self) -> _Images:
        """The calibration images, batch by batch."""
        return _Images(self.data.calibration, self.config.ptq.calibration_batches)

    def test(self, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images and labels, batch by batch."""
        total = min(len(self.data.test), limit or len(self.data.test))
        return self.progress.track(islice(self.data.test, total), "evaluating all executors", total)


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


def _device(name: str) -> torch.device:
    """Raises ConfigError for a device that is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"device: {name!r} cannot be used here: {reason}") from error
    return device


def _be_exact() -> None:
    """Deterministic, no reduced precision, and sums of products only (NNPACK's Winograd computes others)."""
    torch.backends.nnpack.set_flags(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def finish(job: Job, sim: Simulation, folder: Path, steps: list[str]) -> tuple[dict[str, Any], list[Agreement]]:
    """Checks the constraint, writes the files, reads them back and runs every executor on the test data."""
    table = sim.encodings()
    _check_constraint(job.config, sim, table)
    artifact = sim.export(job.example)
    parameters = {name: p.detach().cpu().numpy() for name, p in job.parameters(sim).items()}
    run_folder.save_state(folder / run_folder.STATE, parameters, table)
    _write_models(artifact, folder, job.config.encodings_version)
    (folder / run_folder.CONFIG).write_text(configuration.dump(job.config), encoding="utf-8")
    certificate = certify(artifact)
    proofs = json.dumps(certificate.to_json(per_channel=True), indent=1) + "\n"
    (folder / run_folder.CERTIFICATE).write_text(proofs, encoding="utf-8")
    pair = (folder / run_folder.FLOAT, folder / run_folder.ENCODINGS)
    limit = job.config.ptq.max_eval_batches
    scores, left_out = _Scores(), dict[str, str]()
    others = [
        replace(e, most=max(1, PATIENCE // e.work)) if e.work else e
        for e in executors(folder / run_folder.QDQ, pair, left_out)
    ]
    agreements = _compare(job, sim, artifact, certificate, others, limit, scores)
    report = _report(job, artifact, certificate, scores, agreements, folder, steps)
    if job.config.report.statistics:
        _write_statistics(job, sim, artifact, folder)
    timing = _latency(job, folder) if job.config.report.latency else None
    return report | {"validation_left_out": left_out, "latency": timing}, agreements


def _write_statistics(job: Job, sim: Simulation, artifact: Artifact, folder: Path) -> None:
    """What the report shows of every tensor, measured on a few calibration images, and how they hang together."""
    job.progress.note("measuring every tensor for the report")
    table = sim.encodings()
    samples, count = sample(sim, job.calibration(), job.config.seed)
    tensors = {
        name: statistics.of_tensor(table[name], seen)
        for name, seen in samples.items()
        if np.isfinite(seen.entering).all() and np.isfinite(seen.exact).all()
    }
    document = {"samples": count, "network": describe(artifact), "tensors": tensors}
    (folder / run_folder.STATISTICS).write_text(json.dumps(document) + "\n", encoding="utf-8")


def _latency(job: Job, folder: Path) -> dict[str, Any]:
    files = {"float": folder / run_folder.FLOAT, "quantized": folder / run_folder.QDQ}
    return latency.measure(files, [x.numpy() for x in arguments(job.example)])


def _check_constraint(config: RunConfig, sim: Simulation, table: Table) -> None:
    """The claims at the seam: the table survives loading, and every scale is exactly 2^k where that was asked for."""
    sim.load(table)
    if sim.encodings() != table:
        raise AssertionError("the backend does not give back the encodings that it was given")
    plan = configuration.plan_of(config)
    for site in sim.sites:
        spec = plan.spec(site)
        if spec is not None and spec.power_of_2 and site.role != "bias":
            table[site.name].exponent  # noqa: B018 (raises NotPowerOfTwoError)


def _write_models(artifact: Artifact, folder: Path, version: str) -> None:
    onnx_qdq.export_qdq(artifact, folder)
    onnx_qdq.save(artifact.model, folder / run_folder.FLOAT)
    resolve("exporters", f"aimet-{version}")(artifact, folder)


@dataclass
class _Scores:
    """Top-1 and top-5 hits by executor, and the power of the quantization noise, while batches stream by."""

    classes: int = 0
    samples: int = 0
    hits: dict[str, list[int]] = field(default_factory=dict)
    tied: dict[str, int] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0
    labels: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    expected: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    def stream(self, batches: Iterable[tuple[Tensor, Tensor]], network: Callable[[Arrays], Arrays]) -> Iterator[Arrays]:
        """Yields the images; notes labels and float logits for what runs on them next."""
        for images, labels in batches:
            inputs = [images.numpy()]
            self.labels, self.expected = labels.numpy(), network(inputs)[0]
            self.classes = self.expected.shape[-1]
            self.samples += len(self.labels)
            self._count("float", self.expected)
            self.signal += float(np.square(self.expected, dtype=np.float64).sum())
            yield inputs
        self.labels = np.empty(0, np.int64)  # what runs from now on is no evaluation

    def watch(self, executor: Executor, noise: bool = False) -> Executor:
        """The executor, its hits counted as it runs."""

        def run(batch: Arrays) -> Arrays:
            outputs = executor.run(batch)
            if not self.labels.size:
                return outputs
            self._count(executor.name, outputs[0])
            if noise:
                self.noise += float(np.square(outputs[0] - self.expected, dtype=np.float64).sum())
            return outputs

        return replace(executor, run=run)

    def _count(self, name: str, logits: NDArray[np.float32]) -> None:
        if logits.ndim != 2:
            return
        labels = self.labels[: len(logits), None]  # a slow executor may have been given fewer
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        best = order == labels
        first = np.take_along_axis(logits, order[:, :2], 1)
        tied = int((first[:, 0] == first[:, -1]).sum()) if first.shape[1] > 1 else 0
        self.tied[name] = self.tied.get(name, 0) + tied
        hits = self.hits.setdefault(name, [0, 0])
        hits[0] += int(best[:, 0].sum())
        hits[1] += int(best.any(1).sum())

    def accuracy(self, name: str, top: int = 1) -> float | None:
        """Per cent of samples whose label is among the `top` (1 or 5) largest logits."""
        hits = self.hits.get(name)
        return None if hits is None or not self.samples else round(100 * hits[top == 5] / self.samples, 4)

    def ties(self, name: str) -> float | None:
        """Per cent of samples whose largest logit is not alone: which class is named then is an accident."""
        return round(100 * self.tied[name] / self.samples, 4) if name in self.tied and self.samples else None

    @property
    def sqnr_db(self) -> float | None:
        """Logits of the simulation against the float network's, in dB; None where they are equal."""
        return round(10 * float(np.log10(self.signal / self.noise)), 3) if self.noise and self.signal else None


SIMULATION = "simulation"


def _compare(
    job: Job,
    sim: Simulation,
    artifact: Artifact,
    proof: Certificate,
    others: list[Executor],
    limit: int | None,
    scores: _Scores | None = None,
) -> list[Agreement]:
    """The simulation against other executors, on the test data.

    scores: counts hits on the way, where they are wanted.
    """
    simulation = simulation_executor(sim, job.config.backend, job.device)
    batches: Iterable[Arrays] = ([images.numpy()] for images, _ in job.test(limit))
    if scores is not None:
        others = [scores.watch(e) for e in others]
        simulation = scores.watch(simulation, noise=True)
        batches = scores.stream(job.test(limit), _runner(job.model, job.device))
    # The proof is about sums of products; on a GPU, libraries may choose kernels that compute other sums.
    return compare(simulation, others, batches, artifact, proof=job.device.type == "cpu" and proof)


def _runner(model: nn.Module, device: torch.device) -> Callable[[Arrays], list[NDArray[np.float32]]]:
    def run(batch: Arrays) -> list[NDArray[np.float32]]:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            result = model(*(torch.from_numpy(np.asarray(x)).to(device) for x in batch))
        results = result if isinstance(result, (tuple, list)) else [result]
        return [r.cpu().numpy() for r in results]

    return run


def simulation_executor(sim: Simulation, backend: str, device: torch.device) -> Executor:
    """The simulation as an executor: numpy in, numpy out."""
    run = _runner(sim.model, device)

    def tensors(batch: Arrays) -> dict[str, NDArray[np.float32]]:
        seen: dict[str, NDArray[np.float32]] = {}

        def record(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
            if site.role in ("input", "output"):
                seen[site.name] = quantized.detach().cpu().numpy().copy()
            return quantized

        with sim.intercept(record):
            run(batch)
        return seen

    return Executor(f"{backend} {SIMULATION}", run, tensors)


def _validate_run(
    folder: Path, config: RunConfig, encodings: Path | None, limit: int | None, progress: Progress
) -> Validation:
    """Rebuilds the simulation from a configuration and model.safetensors and compares it with the files beside them."""
    parameters, table = run_folder.load_state(folder / run_folder.STATE)
    plain = replace(config, model=replace(config.model, weights=None), data=datasets.resolved(config.data))
    data = datasets.load(plain.data)
    model = models.build(plain.model.name, num_classes=plain.model.num_classes).float().eval()
    example = next(images[:1] for images, _ in data.test)
    network = _float_network(model, example, config, [example])  # its weights are overwritten
    job = Job(plain, data, model, network, example, progress, _device(plain.device))
    sim = job.simulate()
    _load_parameters(job.parameters(sim), parameters, folder / run_folder.STATE)
    sim.load(table)
    artifact = sim.export(example)
    certificate = certify(artifact)
    pair = (folder / run_folder.FLOAT, encodings or folder / run_folder.ENCODINGS)
    left_out: dict[str, str] = {}
    others = executors(folder / run_folder.QDQ, pair, left_out)
    for backend in names("backends"):
        if backend != config.backend:
            try:
                other = simulate(network, example, configuration.plan_of(plain), backend)
            except MissingExtraError as error:
                left_out[f"{backend} {SIMULATION}"] = str(error)
                continue
            other.model.to(job.device)
            _load_parameters(job.parameters(other), parameters, folder / run_folder.STATE)
            other.load(table)
            others.append(simulation_executor(other, backend, job.device))
    agreements = _compare(job, sim, artifact, certificate, others, limit or config.ptq.max_eval_batches)
    free_scales = ort.inspect(onnx_qdq.load(folder / run_folder.QDQ))
    return Validation(tuple(agreements), free_scales, certificate, left_out)


def _load_parameters(own: dict[str, Tensor], parameters: dict[str, NDArray[Any]], path: Path) -> None:
    shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (own, parameters)]
    wrong = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    if wrong:
        raise FileFormatError(f"{path}: does not fit the network of config.yaml: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(parameters[name]))


def _report(
    job: Job,
    artifact: Artifact,
    certificate: Certificate,
    scores: _Scores,
    agreements: list[Agreement],
    folder: Path,
    steps: list[str],
) -> dict[str, Any]:
    quantization = job.config.quantization
    simulated, measured = f"{job.config.backend} {SIMULATION}", ort.OPTIMIZED
    report: dict[str, Any] = {
        "verdict": document.verdict(agreements),
        "quantization_type": "power_of_2" if document.is_power_of_two(artifact.encodings.values()) else "free_scale",
        "backend": job.config.backend,
        "model": job.config.model.name,
        "dataset": job.config.data.dataset,
        "pipeline_steps": steps,
        "config": {
            role: spec and {"bitwidth": spec.bits, "symmetric": spec.symmetric, "power_of_2": spec.power_of_2}
            for role, spec in ((r, getattr(quantization, r)) for r in configuration.ROLES)
        },
        "initial_accuracy": scores.accuracy("float"),
        "ptq_accuracy": None,
        "final_accuracy": scores.accuracy(simulated),
        "onnxruntime_accuracy": scores.accuracy(measured),
    }
    if scores.classes > 5:
        names = (("initial", "float"), ("final", simulated), ("onnxruntime", measured))
        report |= {f"{key}_accuracy_top5": scores.accuracy(name, 5) for key, name in names}
    initial, final = report["initial_accuracy"], report["final_accuracy"]
    return report | {
        "final_sqnr_db": scores.sqnr_db,
        "tied_logits": scores.ties(simulated),
        "total_improvement": None if initial is None or final is None else round(final - initial, 4),
        "evaluated_samples": scores.samples,
        "model_size_bytes": {
            "float": (folder / run_folder.FLOAT).stat().st_size,
            "quantized": (folder / run_folder.QDQ).stat().st_size,
        },
        "validation": [a.to_json() for a in agreements],
        "certificate": certificate.to_json(),
        "final_quantization_details": document.details(artifact),
        "environment": document.environment(torch.get_num_threads()),
        "duration_seconds": None,
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes report.json, and report.html of it and the files beside it."""
    (folder / run_folder.REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page_of(folder), encoding="utf-8")
