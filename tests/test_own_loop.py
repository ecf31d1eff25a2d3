"""One's own training loop: a quantized module that any loop trains, and that ends as a run like every other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pow2quant
from pow2quant import datasets, models
from pow2quant.config import DataConfig
from pow2quant.errors import ConfigError, OutputError, TrainingError
from tests import documents

PAGE = Path(__file__).resolve().parents[1] / "docs" / "howto" / "own-training-loop.md"

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


def test_a_module_in_training_is_not_copied() -> None:
    """What it computes with is beside it; after `finish` it is like any other."""
    qat, images = started("weights"), batches(1)[0][0]
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match=r"copy its state_dict\(\) instead"):
            attempt(qat)
    qat.finish()
    assert torch.equal(copy.deepcopy(qat)(images), qat(images))


class Around(nn.Module):
    """A network with the quantized one as a part, as Lightning's modules have it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


@pytest.mark.parametrize("exponents", ["tqt", "fixed"])
def test_a_checkpoint_without_views_continues_as_a_part_of_another_module(exponents: str, tmp_path: Path) -> None:
    data, file = batches(8), tmp_path / "model.safetensors"
    whole = started(exponents=exponents)
    optimizer = torch.optim.AdamW(whole.parameter_groups(1e-3))
    train(whole, optimizer, data[:4])
    safetensors.torch.save_model(Around(whole), str(file))
    saved = copy.deepcopy(optimizer.state_dict())
    assert sum(x.untyped_storage().nbytes() for x in whole.state_dict().values()) < 1.1 * file.stat().st_size
    other = started(exponents=exponents)
    assert safetensors.torch.load_model(Around(other), str(file)) == (set(), [])
    again = torch.optim.AdamW(other.parameter_groups(1e-3))
    again.load_state_dict(saved)
    for qat, steps in ((whole, optimizer), (other, again)):
        train(qat, steps, data[4:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.filterwarnings("default")  # a framework has its own
@pytest.mark.parametrize("framework", ["lightning", "accelerate"])
def test_the_page_s_loop_in_a_framework(framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(framework, reason="the page names it, no extra installs it")
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in documents.blocks(PAGE) if framework in (b.skipped or ""))
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block.text, str(PAGE), "exec"), names)
    result = names["result"]
    assert result.verdict.agrees
    rounded = pow2quant.quantize(models.trained_digits_cnn(), "digits", bits="w3a3", methods="none", progress=False)
    assert result.report["final_accuracy"] > rounded.report["final_accuracy"]


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


@pytest.mark.parametrize("norm", ["live", "folded"])
@pytest.mark.parametrize("backend", ["custom", "aimet"])
def test_frozen_weights_stay_and_a_network_that_is_frozen_as_a_whole_learns(norm: str, backend: str) -> None:
    torch.manual_seed(0)
    convolutions = [(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))]
    network = nn.Sequential(*convolutions[0], nn.ReLU(), *convolutions[1], nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    data = torch.randn(32, 3, 8, 8), torch.randint(0, 5, (32,))
    config = QUICK | {"training": {"mode": "full", "batch_norm": norm}}

    def learned() -> int:
        """How many weights, biases, gains and shifts are other ones behind a few steps."""
        qat = pow2quant.qat_model(network.eval(), data, methods="none", backend=backend, config=config, progress=False)
        optimizer = torch.optim.SGD([p for p in qat.parameters() if p.requires_grad], 0.1)
        own = {n: p for n, p in qat.named_parameters() if not n.startswith("exponent_")}
        before = [p.detach().clone() for p in own.values()]
        train(qat, optimizer, [data] * 3)
        assert not any(torch.equal(a, b) for a, b in zip(before, own.values(), strict=True))
        sim, start = qat._learning.sim, dict(network.named_parameters())
        frozen = torch.equal(sim.parameter("0.weight"), sim.network.get_parameter("0.weight"))
        assert norm == "live" or frozen != ("0_weight" in own)
        qat.finish()
        assert all(torch.equal(start[n], p) for n, p in network.named_parameters())
        return len(own)

    assert learned() == (6 if norm == "folded" else 8)
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    assert learned() == (4 if norm == "folded" else 5)
    network[0].requires_grad_(True)
    assert learned() == 6  # live, without gain and shift of the first batch norm
    network.requires_grad_(False)
    assert learned() == (6 if norm == "folded" else 8)
