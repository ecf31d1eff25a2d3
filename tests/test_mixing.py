"""Images of a step that are made of two."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pow2quant import datasets
from pow2quant.config import RunConfig, TrainingConfig, with_values
from pow2quant.errors import ConfigError
from pow2quant.three_steps import qat
from pow2quant.training.mixing import Mixing, cutmix, mixup
from tests.test_distilling import SHORT, data, network, simulated, trainer_of

__all__ = ["data", "network"]

MIXED = replace(SHORT, mixing="cutmix", mixed_steps=1.0)


def test_mixup_is_the_sum_of_its_equation() -> None:
    x = torch.tensor([[1.0, 2.0], [5.0, 6.0], [-3.0, 0.0]])
    expected = torch.stack([0.75 * x[i] + 0.25 * x[i - 1] for i in range(3)])
    torch.testing.assert_close(mixup(x, 0.75), expected)


@given(st.floats(0, 1), st.floats(0, 0.999), st.floats(0, 0.999), st.integers(1, 9), st.integers(1, 9))
def test_cutmix_takes_a_rectangle_of_the_other_image(
    own: float, down: float, across: float, height: int, width: int
) -> None:
    """All pixels are of one of both images; those of the other are a rectangle, of 1 - l of the area at most."""
    x = torch.stack([torch.full((2, height, width), float(i)) for i in range(3)])
    mixed = cutmix(x, own, torch.tensor([down, across]))
    taken = mixed != x
    assert torch.equal(mixed[taken], x.roll(1, 0)[taken])
    assert torch.equal(taken, taken[:1, :1].expand_as(taken))
    rows, columns = taken[0, 0].any(1), taken[0, 0].any(0)
    assert torch.equal(taken[0, 0], rows[:, None] & columns)
    for side in (rows, columns):
        assert bool((side.diff() != 0).sum() <= 2)
    assert int(taken[0, 0].sum()) <= (1 - own) * height * width + 1e-6


def test_a_rectangle_has_its_side_and_its_middle() -> None:
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    taken = (cutmix(x, 0.75, torch.tensor([0.5, 0.25])) != x)[0, 0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6, 0:4] = True
    assert torch.equal(taken, expected)
    assert bool((cutmix(x, 0.0, torch.tensor([0.5, 0.5])) != x).all())
    assert torch.equal(cutmix(x, 1.0, torch.tensor([0.5, 0.5])), x)


@pytest.mark.parametrize("rule", ["cutmix", "mixup"])
def test_a_share_of_the_steps_is_mixed(rule: str) -> None:
    x = torch.randn(4, 1, 16, 16)
    torch.manual_seed(0)
    for share in (0.0, 0.3, 1.0):
        mixing = Mixing(TrainingConfig(mixing=rule, mixed_steps=share, distillation=1.0))
        found = sum(mixing.of([x])[0] is not x for _ in range(500)) / 500
        assert found == pytest.approx(share, abs=0.07)


def test_all_inputs_of_a_network_are_mixed_alike() -> None:
    mixing = Mixing(MIXED)
    x = torch.randn(4, 1, 16, 16)
    for _ in range(5):
        one, other = mixing.of([x, x])
        assert torch.equal(one, other)


def test_a_training_learns_what_the_teacher_says_about_mixed_images(data: datasets.Data, network: nn.Module) -> None:
    seen: list[torch.Tensor] = []
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    trainer = trainer_of(simulated(network, data), data, network, MIXED, teacher=teacher)
    trainer.sim.model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    teacher.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    images = data.train[0][0]
    before = images.clone()
    torch.manual_seed(0)
    with trainer.training():
        trainer.step(*data.train[0])
    student, taught = seen[-2:]
    assert torch.equal(student, taught)
    assert not torch.equal(student, images)
    assert bool(((student == images) | (student == images.roll(1, 0))).all())
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("config", "example", "expected"),
    [
        (
            replace(MIXED, distillation=0.5),
            torch.zeros(1, 3, 8, 8),
            "cutmix mixes no labels; it needs training.distillation: 1",
        ),
        (MIXED, torch.zeros(1, 8), r"cutmix mixes images \(N, C, H, W\); input 1 is \(1, 8\)"),
        (
            replace(MIXED, mixing="mixup"),
            torch.zeros(1, 8, dtype=torch.int64),
            "mixup mixes floats; input 1 is torch.int64",
        ),
    ],
)
def test_what_cannot_be_mixed_is_said(config: TrainingConfig, example: torch.Tensor, expected: str) -> None:
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match=f"training.mixing: {expected}"):
        Mixing(config).check([images, example])


def test_a_run_says_so_before_anything_is_quantized(tmp_path: Path) -> None:
    config = with_values(RunConfig(), {"training.mixing": "mixup"})
    with pytest.raises(ConfigError, match=r"training.mixing: mixup mixes no labels; .* not 0$"):
        qat(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r'training.mixing: "mix" is not legal; legal: one of cutmix, mixup'):
        with_values(RunConfig(), {"training.mixing": "mix"})
