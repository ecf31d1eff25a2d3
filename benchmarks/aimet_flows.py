"""AIMET's documented flows on CIFAR-10: the same lines with AIMET's imports and with ours, accuracies side by side.

    python benchmarks/aimet_flows.py --network models.py:cifar10_resnet20 --weights resnet20.safetensors
        --data-path DIR [--flows ptq qat ...] [--images 1000] [--mean … --std …]

Each flow gets the classes that a script imports, and nothing else that tells whose they are: AIMET's own; AIMET's own,
every scale then rounded to the nearest 2^k, which is what the constraint costs by itself (not where scales are trained
afterwards, nor in QuantAnalyzer, which makes its own simulation); ours with `backend="aimet"` and `backend="custom"`.
Prints a markdown row per flow: top-1 in per cent on the first images of the test set, or why there is none, and the CPU
seconds of all. W8A8, except AdaRound and SeqMSE: W4A8. All ten take ResNet-20 about 9 minutes of one core at 2,000
images. Needs aimet-torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pow2quant import models
from pow2quant.config import DataConfig
from pow2quant.datasets.cifar10 import cifar10


@dataclass
class Scene:
    """What a flow works with.

    network: trained. prepared: the same, by AIMET's model preparer. train: images and labels. test: what is judged.
    """

    network: nn.Module
    prepared: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    folder: Path

    @property
    def dummy(self) -> Tensor:
        return self.train[0][:1]

    def model(self, folded: bool = True) -> nn.Module:
        from aimet_torch.batch_norm_fold import fold_all_batch_norms

        model = copy.deepcopy(self.prepared).eval()
        if folded:
            fold_all_batch_norms(model, None, self.dummy)
        return model

    def calibrate(self, model: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            for x in self.train[0][:256].split(64):
                model(x)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, *_: Any) -> float:
        model.eval()
        return self.score([model(x) for x in self.test[0].split(100)])

    def score(self, logits: list[Tensor]) -> float:
        return 100 * float((torch.cat(logits).argmax(1) == self.test[1]).float().mean())


Tools = dict[str, Any]


def ptq(s: Scene, t: Tools) -> float:
    sim = t["QuantizationSimModel"](s.model(), s.dummy, default_param_bw=8, default_output_bw=8)
    sim.compute_encodings(s.calibrate)
    return s.accuracy(sim.model)


def equalization(s: Scene, t: Tools) -> float:
    from aimet_torch.cross_layer_equalization import equalize_model

    model = s.model(folded=False)
    equalize_model(model, tuple(s.dummy.shape), s.dummy)
    sim = t["QuantizationSimModel"](model, s.dummy, quant_scheme="tf_enhanced")
    sim.compute_encodings(s.calibrate)
    return s.accuracy(sim.model)


def adaround(s: Scene, t: Tools) -> float:
    parameters = t["AdaroundParameters"](DataLoader(s.train[0][:256], 64), 4, default_num_iterations=40)
    model = t["Adaround"].apply_adaround(
        s.model(), s.dummy, parameters, path=str(s.folder), filename_prefix="adaround", default_param_bw=4
    )
    sim = t["QuantizationSimModel"](model, s.dummy, default_param_bw=4)
    sim.set_and_freeze_param_encodings(encoding_path=str(s.folder / "adaround.encodings"))
    sim.compute_encodings(s.calibrate)
    return s.accuracy(sim.model)


def sequential_mse(s: Scene, t: Tools) -> float:
    sim = t["QuantizationSimModel"](s.model(), s.dummy, default_param_bw=4)
    t["apply_seq_mse"](sim, list(s.train[0][:128].split(64)), num_candidates=10)
    sim.compute_encodings(s.calibrate)
    return s.accuracy(sim.model)


def _train(s: Scene, model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    model.train()
    batches = zip(s.train[0].split(64), s.train[1].split(64), strict=True)
    for _, (x, y) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def training(s: Scene, t: Tools) -> float:
    from aimet_torch.common.defs import QuantScheme

    scheme = QuantScheme.training_range_learning_with_tf_init
    sim = t["QuantizationSimModel"](s.model(), s.dummy, quant_scheme=scheme)
    sim.compute_encodings(s.calibrate)
    _train(s, sim.model, 8)
    return s.accuracy(sim.model)


def batch_norm(s: Scene, t: Tools) -> float:
    """Without folding to scales, which AIMET itself cannot do on a residual network."""
    sim = t["QuantizationSimModel"](copy.deepcopy(s.network), s.dummy, config_file="default")
    sim.compute_encodings(s.calibrate)
    _train(s, sim.model, 4)
    t["reestimate_bn_stats"](sim.model, DataLoader(s.train[0][:256], 64), 4, lambda model, x: model(x))
    return s.accuracy(sim.model)


def mixed_precision(s: Scene, t: Tools) -> float:
    sim = t["QuantizationSimModel"](s.model(), s.dummy)
    configurator = t["MixedPrecisionConfigurator"](sim)
    configurator.set_precision(sim.model.layer3, "int8", param={"weight": "int4"})
    configurator.set_precision(sim.model.conv1, "int16", param={"weight": "int8"})
    configurator.apply(str(s.folder / "log"))
    sim.compute_encodings(s.calibrate)
    return s.accuracy(sim.model)


def analyzer(s: Scene, t: Tools) -> float:
    """The accuracy with quantized activations only, which is one of its results."""
    from aimet_torch.common.utils import CallbackFunc

    found = t["QuantAnalyzer"](
        s.model(), s.dummy, CallbackFunc(s.calibrate, None), CallbackFunc(lambda m, _: s.accuracy(m), None)
    )
    sim = found._create_quantsim_and_encodings("tf_enhanced", 8, 8, None)
    _, _, activations = found.check_model_sensitivity_to_quantization(sim)
    return float(activations)


def export(s: Scene, t: Tools) -> float:
    """The accuracy of the exported float ONNX, whose weights lie on their grids, in onnxruntime."""
    sim = t["QuantizationSimModel"](s.model(), s.dummy)
    sim.compute_encodings(s.calibrate)
    path = s.folder / "model.onnx"
    sim.onnx.export(s.test[0][:100], str(path), input_names=["x"], output_names=["y"], dynamo=False)
    table = json.loads(path.with_suffix(".encodings").read_text())
    assert len(table["param_encodings"]) > 20, "encodings of all weights"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return s.score([torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0]) for x in s.test[0].split(100)])


def reload(s: Scene, t: Tools) -> float:
    sims = [t["QuantizationSimModel"](s.model(), s.dummy) for _ in range(2)]
    sims[0].compute_encodings(s.calibrate)
    sims[0].save_encodings_to_json(str(s.folder), "saved")
    sims[1].load_encodings(str(s.folder / "saved.json"))
    with torch.no_grad():
        first, second = (sim.model(s.test[0][:50]) for sim in sims)
    assert np.array_equal(first.numpy(), second.numpy()), "the reloaded simulation computes the same"
    return s.accuracy(sims[1].model)


FLOWS: dict[str, Callable[[Scene, Tools], float]] = {
    "PTQ": ptq,
    "cross-layer equalization": equalization,
    "AdaRound": adaround,
    "SeqMSE": sequential_mse,
    "QAT": training,
    "BN re-estimation": batch_norm,
    "mixed precision": mixed_precision,
    "QuantAnalyzer": analyzer,
    "export": export,
    "encodings reload": reload,
}


TOOLS = {
    "Adaround": "adaround.adaround_weight",
    "AdaroundParameters": "adaround.adaround_weight",
    "MixedPrecisionConfigurator": "mixed_precision",
    "QuantAnalyzer": "quant_analyzer",
    "apply_seq_mse": "seq_mse",
    "reestimate_bn_stats": "bn_reestimation",
}
"""What a script imports beside `QuantizationSimModel`, and from which module; ours are in `pow2quant.quantsim`."""


ROUNDED = "AIMET, rounded"
UNROUNDED = ("QAT", "BN re-estimation", "QuantAnalyzer")
"""Flows in which rounding at the end of `compute_encodings` does not hold until the accuracy is measured."""


def rounded(base: Any) -> type:
    """AIMET's class, whose `compute_encodings` ends with every scale at the nearest 2^k, zero points as they follow."""

    class Rounded(base):  # type: ignore[misc]
        def compute_encodings(self, *args: Any, **kwargs: Any) -> None:
            super().compute_encodings(*args, **kwargs)
            for quantizer in filter(lambda q: q.is_initialized(), self.quantizers()):
                scale = quantizer.get_scale().detach().log2().round().exp2()
                low = quantizer.qmin if quantizer.symmetric else (quantizer.get_min() / scale).round()
                quantizer.set_range(scale * low, scale * (low + quantizer.qmax - quantizer.qmin))

    return Rounded


def imports() -> dict[str, Tools]:
    """What a script imports, by whose it is."""
    import aimet_torch

    from pow2quant import QuantizationSimModel, quantsim

    theirs = {name: getattr(import_module(f"aimet_torch.{module}"), name) for name, module in TOOLS.items()}
    ours = {name: getattr(quantsim, name) for name in TOOLS}
    return {
        "AIMET": theirs | {"QuantizationSimModel": aimet_torch.QuantizationSimModel},
        ROUNDED: theirs | {"QuantizationSimModel": rounded(aimet_torch.QuantizationSimModel)},
        "aimet": ours | {"QuantizationSimModel": partial(QuantizationSimModel, backend="aimet")},
        "custom": ours | {"QuantizationSimModel": partial(QuantizationSimModel, backend="custom")},
    }


def cell(flow: Callable[[Scene, Tools], float], scene: Scene, tools: Tools) -> str:
    """The accuracy, or why there is none."""
    torch.manual_seed(0)
    try:
        return f"{flow(scene, tools):.2f}"
    except Exception as error:
        kind = "refused" if "backend=" in str(error) else f"failed: {type(error).__name__}"
        return f"{kind}: {(str(error).splitlines() or [''])[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=list(FLOWS))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--std", type=float, nargs=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    from aimet_torch.model_preparer import prepare_model

    train, _, test = cifar10(DataConfig("cifar10", options.data_path, mean=options.mean, std=options.std))
    images = train.__getitems__(list(range(512))), test.__getitems__(list(range(options.images)))
    network = models.build(options.network, weights=Path(options.weights)).eval()
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(network, prepare_model(network), *images, Path(folder))
        accuracy = scene.accuracy(network)
        print(f"{options.network}, first {options.images:,} test images, float {accuracy:.2f} %\n")
        print(f"| flow | {' | '.join(imports())} | CPU s |\n|---|---|---|---|---|---|")
        for name in options.flows:
            before = process_time()
            cells = [
                "" if whose == ROUNDED and name in UNROUNDED else cell(FLOWS[name], scene, tools)
                for whose, tools in imports().items()
            ]
            print(f"| {name} | {' | '.join(cells)} | {process_time() - before:.0f} |", flush=True)


if __name__ == "__main__":
    main()
