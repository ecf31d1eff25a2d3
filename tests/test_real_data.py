"""Trained networks on CIFAR-10, when POW2QUANT_DATA names a folder that holds them; skipped otherwise.

The folder holds `models.py` with `cifar10_resnet20`, `weights/cifar10_resnet20.safetensors`, and `cifar10.npz` or
`unpack_cifar10.py`, which writes it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from pow2quant import ptq
from pow2quant.config import RunConfig, with_values


@pytest.fixture(scope="module")
def cifar(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cifar10.npz."""
    if (data_path / "cifar10.npz").is_file():
        return data_path
    script = data_path / "unpack_cifar10.py"
    if not script.is_file():
        pytest.skip(f"{data_path}: neither cifar10.npz nor unpack_cifar10.py")
    target = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, str(script), str(target), "--npz", "--train", "1000"], check=True)
    return target


@pytest.mark.parametrize(("weight", "activation", "floor"), [(8, 8, 91.5), (4, 8, 86.5), (4, 4, 82.0)])
def test_resnet20_keeps_its_accuracy_and_agrees(
    cifar: Path, data_path: Path, tmp_path: Path, weight: int, activation: int, floor: float
) -> None:
    values = {
        "model.name": f"{data_path}/models.py:cifar10_resnet20",
        "model.weights": f"{data_path}/weights/cifar10_resnet20.safetensors",
        "data.dataset": "cifar10",
        "data.path": str(cifar),
        "quantization.weight.bitwidth": weight,
        "quantization.output.bitwidth": activation,
        "ptq.calibration_batches": 8,
        "ptq.max_eval_batches": 32,
    }
    result = ptq(with_values(RunConfig(), values), tmp_path / "run")
    assert not any(a.differing for a in result.agreements)
    assert {a.claim for a in result.agreements} == {"proved"}
    assert result.report["initial_accuracy"] > 92
    assert result.report["final_accuracy"] > floor
