"""One's own training loop: a quantized module that any loop trains, and that ends as a run like every other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pow2quant
from pow2quant import datasets, models
from pow2quant.config import DataConfig
from pow2quant.errors import ConfigError, OutputError, TrainingError

QUICK = {"report": {"statistics": False, "latency": False}, "ptq": {"calibration_batches": 4}}


def started(mode: str = "full", **training: Any) -> Any:
    config = QUICK | {"training": {"mode": mode, **training}}
    net = models.trained_digits_cnn()
    return pow2quant.qat_model(net, "digits", bits="w3a3", methods="none", config=config, progress=False)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [batch for batch, _ in zip(datasets.load(DataConfig()).train, range(count), strict=False)]


def train(qat: Any, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    qat.train()
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(qat(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("mode", "training"),
    [
        ("full", {}),
        ("full", {"exponents": "lsq"}),
        ("full", {"exponents": "fixed", "batch_norm": "folded"}),
        ("weights", {}),
    ],
)
def test_a_loop_of_one_s_own_trains_and_ends_as_a_run(mode: str, training: dict[str, Any], tmp_path: Path) -> None:
    qat, data = started(mode, **training), batches(20)
    optimizer = torch.optim.AdamW(qat.parameter_groups(1e-3))
    with torch.no_grad():
        before = nn.functional.cross_entropy(qat.eval()(data[0][0]), data[0][1])
    train(qat, optimizer, data[:10])
    qat.freeze_batch_norm()
    qat.freeze_exponents()
    train(qat, optimizer, data[10:])
    with torch.no_grad():
        outputs = qat.eval()(data[0][0])
        assert nn.functional.cross_entropy(outputs, data[0][1]) < before
    result = qat.finish(tmp_path / "run")
    assert result.verdict.agrees
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert f"qat ({mode})" in result.report["pipeline_steps"]
    if mode == "full":
        assert torch.equal(result.model(data[0][0]), outputs), "what was trained is what is exported"
    assert torch.equal(qat(data[0][0]), result.model(data[0][0]))


def test_a_checkpoint_of_the_module_continues_to_the_bit() -> None:
    data = batches(8)
    whole = started()
    optimizer = torch.optim.AdamW(whole.parameter_groups(1e-3))
    train(whole, optimizer, data[:4])
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, data[4:])
    other = started()
    again = torch.optim.AdamW(other.parameter_groups(1e-3))
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(other, again, data[4:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert (whole.finish().folder / "model.onnx").read_bytes() == (other.finish().folder / "model.onnx").read_bytes()


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    qat = started("weights")
    with pytest.raises(ConfigError, match="give the device to qat_model"):
        qat.double()
    assert qat.to("cpu") is qat
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with torch.no_grad():
        weight = next(qat.parameters())
        kept = weight.clone()
        weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="weights are not finite"):
        qat.finish()
    with torch.no_grad():
        weight.copy_(kept)
    with pytest.raises(OutputError, match="taken"):
        qat.finish(tmp_path / "taken")
    qat.finish(tmp_path / "run")
    with pytest.raises(TrainingError, match="finished already"):
        qat.finish()
