"""What training takes from float networks: a teacher's logits, and what the float network computes behind blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.backends.base import Simulation, inputs
from pow2quant.config import TrainingConfig
from pow2quant.frontends.copies import copied
from pow2quant.methods.reconstruction import blocks

CLASSES = ("classification", "segmentation", "none")
"""Tasks whose results are logits."""


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation, Hinton et al. 2015, section 2: T^2 * KL(teacher / T || logits / T), the mean of a batch.

    logits, teacher: (N, classes).
    """
    student, target = (F.log_softmax(x.float() / temperature, dim=1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


class Distillation:
    """The float networks beside the one that is trained.

    networks: those that compute, the last one for its logits. watched: by site name, what the trained network has just
    computed behind its blocks; empty without features.
    """

    def __init__(
        self,
        config: TrainingConfig,
        task: str,
        network: nn.Module,
        teacher: nn.Module | None,
        sim: Simulation,
        device: torch.device,
    ) -> None:
        """network: the float one. teacher: whose logits are imitated; None: those of the float network."""
        self.config, self.task = config, task
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

    def loss(self, result: Tensor, arguments: Sequence[Tensor]) -> Tensor:
        """What is added to the loss of the task. result: the first of what the trained network gives for arguments."""
        share, weight = self.config.distillation, self.config.feature_distillation
        if not share and not weight:
            return result.new_zeros(())
        with torch.no_grad():
            teacher = [inputs(network(*arguments))[0] for network in self.networks][-1]
        loss = result.new_zeros(())
        if share and self.task in CLASSES:
            loss = share * divergence(result, teacher, self.config.temperature)
        elif share:
            loss = share * F.mse_loss(result, teacher)
        return loss + weight * self._error() if weight else loss

    def _error(self) -> Tensor:
        """The mean over all blocks of the error's energy by that of the float network's values."""
        pairs = [(self.watched[name].float(), exact.float()) for name, exact in self._exact.items()]
        errors = [(x - y).square().sum() / y.square().sum().clamp_min(torch.finfo(y.dtype).tiny) for x, y in pairs]
        return torch.stack(errors).mean()


def _keep(kept: dict[str, Tensor], name: str, _: nn.Module, __: object, result: Tensor) -> None:
    kept[name] = result
