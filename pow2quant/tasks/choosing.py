"""Which task a network's data are for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from pow2quant.errors import ConfigError, DataError
from pow2quant.plugins import names, resolve
from pow2quant.tasks.base import Metric, Shapes, Task
from pow2quant.tasks.named import JUDGED, Named
from pow2quant.tasks.own import NONE, metric_of
from pow2quant.tasks.segmentation import refuse_pictures


@dataclass(frozen=True)
class Judged:
    """A task whose metrics begin with the user's own."""

    task: Task
    metrics: tuple[Metric, ...]

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def diagnostics(self) -> tuple[Metric, ...]:
        return self.task.diagnostics

    @property
    def loss(self) -> str:
        return self.task.loss

    @property
    def threshold(self) -> float:
        """That of the task, see `Classification`; 0 where it has none."""
        return float(getattr(self.task, "threshold", 0))

    def check(self, targets: Any, samples: int, where: str) -> Any:
        """See `Task.check`."""
        return self.task.check(targets, samples, where)


def task_of(
    name: str | None, metric: Any, targets: Any, shapes: Shapes, probable: bool = False, classes: int = 0
) -> Task:
    """The task by name, or the first in the order of `plugins.TABLES` that the data fit; the metric leads its metrics.

    targets: of one batch; shapes: of one sample's outputs. metric: None, or what `own.metric_of` takes. probable:
    whether the network ends in a sigmoid, so that its outputs are probabilities. classes: how many there are, where the
    outputs are indices of classes.
    Raises ConfigError for an unknown name, a task that needs a metric, and a metric that nothing can be compared with.
    """
    task = _named(name, targets, shapes, classes) if classes else None
    task = task or cast(Task, resolve("tasks", name or _fitting(targets, shapes, metric))(shapes))
    if task.name == "segmentation":
        refuse_pictures(targets, shapes)
    if probable and hasattr(task, "threshold"):
        task = replace(cast(Any, task), threshold=0.5)
    if metric is None:
        if name is not None and not task.metrics and name != "none":
            raise ConfigError(f"task: {name} has no metric of its own; give --metric file.py:function")
        return task
    if targets is None or task.name == "none":
        raise ConfigError("metric: the data have no targets to compare with")
    own = metric_of(metric, task.metrics, getattr(task, "arguments", NONE))
    return Judged(task, (own, *(m for m in task.metrics if m.name != own.name)))


def _named(name: str | None, targets: Any, shapes: Shapes, classes: int) -> Task | None:
    """A task of class indices whose outputs are such."""
    kept = shapes[0][:1] == (1,)  # argmax(1, keepdim=True)
    logits = [(classes, *shapes[0][kept:]), *shapes[1:]]
    fitting = (n for n in JUDGED if name in (None, n) and resolve("tasks", n).fits(targets, logits))
    found = next(fitting, None)
    return None if found is None else Named(resolve("tasks", found)(logits), classes, kept)


def unread(targets: Any, shapes: Shapes, where: str) -> str:
    """That targets which fit no task are not used, as a warning.

    Raises DataError for text: which output stands for which word is not in the data, and a guess would count wrong.
    """
    text = next((x for x in targets if isinstance(x, str | bytes)), None) if isinstance(targets, list) else None
    if text is not None:
        raise DataError(
            f"{where}: the targets are text ({text!r}); give class indices, in the order of the network's outputs, "
            "or --metric, or --task none"
        )
    kind = f"of shape {tuple(targets.shape)}" if hasattr(targets, "shape") else f"a {type(targets).__name__}"
    outputs = ", ".join(f"(N, {', '.join(map(str, shape))})" for shape in shapes)
    return (
        f"the targets, {kind}, fit no task for outputs of {outputs} and are not used; "
        "--task or --metric say what they are"
    )


def _are_names(targets: Any, shape: tuple[int, ...]) -> bool:
    """Whether these are more labels than the network has outputs, as those of identities whose embeddings it gives."""
    labels = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point() and len(shape) == 1
    return bool(labels and shape[0] > 1 and targets.numel() and targets.max() >= shape[0])


def _fitting(targets: Any, shapes: Shapes, metric: Any) -> str:
    if targets is None:
        return "none"
    known = [name for name in names("tasks") if name not in ("none", "detection")]
    judged = metric is not None
    own = judged and not (isinstance(metric, str) and metric.isidentifier())
    if own and _are_names(targets, shapes[0]):
        known.remove("classification")
    fitting = (name for name in known if resolve("tasks", name).fits(targets, shapes))
    return next(fitting, "detection" if judged else "none")
