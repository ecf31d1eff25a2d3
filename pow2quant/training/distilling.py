"""What training takes from float networks: a teacher's logits, and what the float network computes behind blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.backends.base import Simulation, inputs
from pow2quant.config import TrainingConfig
from pow2quant.frontends.copies import copied
from pow2quant.methods.reconstruction import blocks
from pow2quant.tasks.base import Task

CLASSES = ("classification", "segmentation", "none")
"""Tasks whose results are logits."""

CERTAIN = 1e-6
"""Probabilities are no closer to 0 and 1."""


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation, Hinton et al. 2015, section 2: T^2 * KL(teacher / T || logits / T), the mean of all rows.

    logits, teacher: (N, classes).
    """
    student, target = (F.log_softmax(x.float() / temperature, dim=1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def rows(results: Tensor, targets: Any, threshold: float) -> Tensor:
    """Results as logits (rows, classes): of each sample, pixel or token; of one for two classes, those of both.

    results: (N, C, …), or (N, …, C) for targets (N, …), or (N,). threshold: 0.5 where they are probabilities.
    """
    if results.ndim < 2:
        results = results[:, None]
    shape = targets.shape if isinstance(targets, Tensor) else None
    last = shape == results.shape[:-1] != results.shape[:1] + results.shape[2:]
    flat = results.movedim(-1 if last else 1, -1).flatten(0, -2).float()
    if flat.shape[1] > 1:
        return flat
    flat = torch.logit(flat, CERTAIN) if threshold else flat
    return torch.cat([flat, torch.zeros_like(flat)], 1)


class Distillation:
    """The float networks beside the one that is trained.

    networks: those that compute, the last one for its logits. watched: by site name, what the trained network has just
    computed behind its blocks; empty without features.
    """

    def __init__(
        self,
        config: TrainingConfig,
        task: Task,
        network: nn.Module,
        teacher: nn.Module | None,
        sim: Simulation,
        device: torch.device,
    ) -> None:
        """network: the float one. teacher: whose logits are imitated; None: those of the float network."""
        self.config = config
        self.of_classes, self.threshold = task.name in CLASSES, float(getattr(task, "threshold", 0))
        self.watched: dict[str, Tensor] = {}
        self._exact: dict[str, Tensor] = {}
        if config.feature_distillation:
            network = copied(sim.network).to(device)
            for end in (part[-1] for part in blocks(sim)):
                site = sim.placement.quantized.get(end.name)
                if site is not None:
                    self.watched[site.name] = torch.empty(0)
                    module = network.get_submodule(str(end.target))
                    module.register_forward_hook(partial(_keep, self._exact, site.name))
        if teacher is None:
            self.networks = [network]
        elif config.feature_distillation:
            self.networks = [network, teacher]
        else:
            self.networks = [teacher]

    def loss(self, results: Sequence[Tensor], arguments: Sequence[Tensor], targets: Any = None) -> Tensor:
        """What is added to the loss of the task. results: of the trained network for these arguments."""
        share, weight = self.config.distillation, self.config.feature_distillation
        if not share and not weight:
            return results[0].new_zeros(())
        with torch.no_grad():
            teacher = [inputs(network(*arguments)) for network in self.networks][-1]
        loss = results[0].new_zeros(())
        if share:
            others = [(x, y) for x, y in zip(results[1:], teacher[1:], strict=False) if x.shape == y.shape]
            loss = share * (self._first(results[0], teacher[0], targets) + sum(starmap(_relative, others)))
        return loss + weight * self._error() if weight else loss

    def _first(self, result: Tensor, teacher: Tensor, targets: Any) -> Tensor:
        """How far the first result is from the teacher's."""
        if not self.of_classes or (targets is None and result.shape[1:].numel() == 1):
            return F.mse_loss(result, teacher)
        student, target = (rows(x, targets, self.threshold) for x in (result, teacher))
        return divergence(student, target, self.config.temperature)

    def _error(self) -> Tensor:
        """The mean over all blocks of the error's energy by that of the float network's values."""
        pairs = [(self.watched[name].float(), exact.float()) for name, exact in self._exact.items()]
        return torch.stack([_relative(x, y) for x, y in pairs]).mean()


def _relative(x: Tensor, y: Tensor) -> Tensor:
    """The error's energy by that of y."""
    error, exact = x.float() - y.float(), y.float()
    return error.square().sum() / exact.square().sum().clamp_min(torch.finfo(exact.dtype).tiny)


def _keep(kept: dict[str, Tensor], name: str, _: nn.Module, __: object, result: Tensor) -> None:
    kept[name] = result
