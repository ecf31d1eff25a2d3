"""Every executor beside a simulation of which one rule of rounding is wrong: what has to be noticed, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pow2quant import plugins, simulate, targets
from pow2quant.adapters import onnx_qdq
from pow2quant.artifact import Agreement
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation.agreement import compare
from tests.target_networks import Everything, Maps

NODES = {
    Everything: {
        "products": ("relu",),
        "sums": ("relu_1",),
        "averages": ("pool", "mean"),
        "multiplications": ("mul",),
        "moves": ("concat",),
        "functions": ("sigmoid",),
    },
    Maps: {"products": ("relu",), "sums": ("relu_1",), "averages": ("mean",)},
}
"""Where each kind of operation stands in a network: the first that rounds, of some that may."""


@dataclass(frozen=True)
class Case:
    """How an executor is asked: for a target that it has the arithmetic of, with a network.

    absent: kinds of operations that never round there. coarse: halves are too rare to be met, so that the wrong rule is
    floor. follows: the executor rounds as the file says, so that the wrong rule is in the file, and the simulation is
    right. functions: it computes functions, where the others read the file's tables.
    """

    target: str
    network: type[nn.Module] = Everything
    absent: tuple[str, ...] = ()
    coarse: bool = False
    follows: bool = False
    functions: bool = False

    @property
    def nodes(self) -> dict[str, tuple[str, ...]]:
        """Where a wrong rule is noticed, by kind of operation."""
        absent = self.absent if self.functions else (*self.absent, "functions")
        return {kind: names for kind, names in NODES[self.network].items() if kind not in absent}


CASES = {
    "engine": Case("onnxruntime", follows=True),
    "c": Case("onnxruntime", follows=True),
    "c-arm": Case("onnxruntime", follows=True),
    "c-riscv64": Case("onnxruntime", follows=True),
    "onnxruntime": Case("onnxruntime"),
    "onnxruntime-web": Case("onnxruntime-web"),
    "onnxruntime-node": Case("onnxruntime-web"),
    "tract": Case("tract"),
    "openvino": Case("openvino", coarse=True),
    "litert": Case("litert"),
    "tflite-micro": Case("tflite-micro"),
    "executorch": Case("executorch"),
    "pt2": Case("onnxruntime"),
    "qonnx": Case("qonnx", coarse=True),
    "esp-ppq (esp32p4)": Case("esp32-p4", coarse=True, absent=("sums", "moves"), functions=True),
    "esp-ppq (esp32s3)": Case("esp32-s3", coarse=True, absent=("sums", "moves"), functions=True),
    "hls4ml": Case("hls4ml", Maps, coarse=True),
}
"""By the name of the executor; in brackets, what it stands for."""


def agreements(name: str, kind: str | None, folder: Path) -> list[Agreement]:
    """An executor against the simulation; kind: of the operations of which one of the two rounds wrongly."""
    case = CASES[name]
    right = wrong = targets.load(case.target)
    if kind is not None:
        rule = "half_up" if getattr(right.rounding, kind) == HALF_EVEN else HALF_EVEN
        wrong = replace(right, rounding=replace(right.rounding, **{kind: "floor" if case.coarse else rule}))
    torch.manual_seed(0)
    x = torch.randn(64 if case.coarse else 16, *case.network.shape)
    plan = replace(plan_of(with_values(RunConfig(), {"target": case.target})), target=right if case.follows else wrong)
    sim = simulate(case.network().eval(), x[:1], plan)
    sim.calibrate([x])
    artifact = sim.export(x[:1])
    del artifact.model.metadata_props[:]
    targets.note(artifact.model, wrong)
    onnx_qdq.export_qdq(artifact, folder)
    found = plugins.resolve("validators", name.partition(" ")[0])(folder / "model.onnx")
    return compare(simulation_executor(sim, "custom", torch.device("cpu")), found, [[x.numpy()]], artifact)
