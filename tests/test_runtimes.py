"""Runtimes beside onnxruntime give the bits of their target's simulation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from pow2quant import plugins, simulate, targets
from pow2quant.adapters import onnx_qdq
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation.agreement import compare
from tests.target_networks import NETWORKS as WITHOUT_TOKENS
from tests.target_networks import Tokens

NETWORKS = WITHOUT_TOKENS | {"Tokens": Tokens}

RUNTIMES = ("litert", "tflite-micro", "openvino", "tract", "onnxruntime-web", "onnxruntime-node", "qonnx", "executorch")
PARTS = {("openvino", "Signal"), ("litert", "Tokens"), ("tflite-micro", "Tokens")}
"""OpenVINO 2026.4's mean over one dimension of maps is wrong, by up to 245 LSB; a token moves a constant."""

TARGETS = {"onnxruntime-node": "onnxruntime-web"}
"""Of runtimes that share the target of another."""


@cache
def missing(name: str) -> str:
    """Why a runtime cannot be run here; "" where it can."""
    try:
        plugins.resolve("validators", name)(Path("nothing.onnx"))
    except MissingExtraError as error:
        return str(error)
    except Exception:
        return ""
    return ""


def agreements(runtime: str, target: targets.Target, network: str, folder: Path):
    """What the runtime gives of the network's QDQ file, against the simulation of the target."""
    if reason := missing(runtime):
        pytest.skip(reason)
    torch.manual_seed(0)
    x = torch.randn(16, *NETWORKS[network].shape)
    plan = plan_of(with_values(RunConfig(), {"target": target.name}))
    sim = simulate(NETWORKS[network]().eval(), x[:1], replace(plan, target=target))
    sim.calibrate([x])
    artifact = sim.export(x[:1])
    onnx_qdq.export_qdq(artifact, folder)
    found = plugins.resolve("validators", runtime)(folder / "model.onnx")
    simulation = simulation_executor(sim, "custom", torch.device("cpu"))
    return compare(simulation, found, [[x.numpy()]], artifact, proof=True)


@pytest.mark.parametrize(("runtime", "network"), [p for p in product(RUNTIMES, NETWORKS) if p not in PARTS])
def test_a_runtime_gives_the_bits_of_its_targets_simulation(runtime, network, tmp_path):
    for agreement in agreements(runtime, targets.load(TARGETS.get(runtime, runtime)), network, tmp_path):
        assert agreement.differing == 0, agreement.first_diverging
        assert agreement.claim == "observed on 16 inputs"


@pytest.mark.parametrize("runtime", ["litert", "tract", "onnxruntime-web", "executorch"])
@pytest.mark.parametrize("network", WITHOUT_TOKENS)
def test_one_file_with_tied_sums_is_exact_everywhere(runtime, network, tmp_path):
    for agreement in agreements(runtime, targets.load("portable"), network, tmp_path):
        assert agreement.differing == 0, agreement.first_diverging


@pytest.mark.parametrize("runtime", ["litert"])
def test_what_a_file_format_does_not_have_is_named(runtime, tmp_path):
    if reason := missing(runtime):
        pytest.skip(reason)
    x = torch.randn(4, 3, 8, 8)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AvgPool2d(3, 2, 1))
    sim = simulate(network.eval(), x[:1])
    sim.calibrate([x])
    with pytest.raises(UnsupportedModelError, match="1: an average"):
        plugins.resolve("exporters", "tflite")(sim.export(x[:1]), tmp_path / "tflite")
    narrow = plan_of(replace(RunConfig(), quantization=replace(RunConfig().quantization, output=None)))
    sim = simulate(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)).eval(), x[:1], narrow)
    sim.calibrate([x])
    with pytest.raises(UnsupportedModelError, match=r"0\.output: the network's output stays float"):
        plugins.resolve("exporters", "tflite")(sim.export(x[:1]), tmp_path / "tflite")
