"""Steps of the optimizer in proportion to what they change."""

from dataclasses import replace

import torch
from torch import nn

from pow2quant import datasets
from pow2quant.training.relative import LEAST, RelativeSteps
from tests.test_distilling import SHORT, data, network, simulated, trainer_of

__all__ = ["data", "network"]


def test_a_step_is_multiplied_by_the_root_mean_square_of_its_channel() -> None:
    weight, bias = torch.tensor([[3.0, -4.0], [0.3, 0.4]]), torch.tensor([0.0, 2.0])
    sizes = torch.tensor([[12.5], [0.125]]).sqrt()
    expected = weight + 0.5 * sizes / sizes.prod().sqrt(), bias + 0.5
    with RelativeSteps([weight, bias], wanted=True).applied():
        weight += 0.5
        bias += 0.5
    torch.testing.assert_close((weight, bias), expected)


def test_weights_that_are_zero_can_move() -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    with RelativeSteps([weight], wanted=True).applied():
        weight[1] += 1
    torch.testing.assert_close(weight[1], torch.full((2,), LEAST**0.5))


def test_a_training_takes_relative_steps_where_the_configuration_says_so(
    data: datasets.Data, network: nn.Module
) -> None:
    plain, relative = (
        trainer_of(simulated(network, data), data, network, replace(SHORT, relative_steps=wanted))
        for wanted in (False, True)
    )
    weights = [t.detach() for t in plain.tensors if t.ndim > 1]
    before = [t.clone() for t in weights]
    for trainer in (plain, relative):
        with trainer.training():
            trainer.step(*data.train[0])
    steps = relative.relative
    for old, one, other, unit in zip(before, weights, steps.tensors, steps.units, strict=True):
        torch.testing.assert_close(other - old, (one - old) * unit, rtol=1e-3, atol=1e-6)
    assert any((unit > 1.5).any() for unit in steps.units)
