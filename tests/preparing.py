"""How a prepared network is compared with the user's."""

import torch
from torch import Tensor, nn


def same(network: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Both compute the same, for batches of any size."""
    with torch.no_grad():
        for batch in (x, x[:1], torch.cat([x, x])):
            torch.testing.assert_close(network(batch), model(batch), rtol=tolerance, atol=tolerance)
