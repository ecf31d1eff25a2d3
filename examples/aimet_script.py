"""A script for AIMET, ported by one line: its import.

python examples/aimet_script.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

# from aimet_torch import QuantizationSimModel    <- the line that was here
from pow2quant import QuantizationSimModel

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/aimet_script")
folder.mkdir(parents=True, exist_ok=True)

images = torch.from_numpy(load_digits().images).float()[:, None] / 16
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(256, 10)),
).eval()
dummy_input = torch.randn(1, 1, 8, 8)

sim = QuantizationSimModel(model, dummy_input, quant_scheme="tf_enhanced", default_param_bw=8, default_output_bw=8)


def calibrate(model):
    with torch.no_grad():
        for batch in images[:512].split(64):
            model(batch)


sim.compute_encodings(calibrate)
sim.onnx.export(dummy_input, f"{folder}/model.onnx", input_names=["input"], encoding_version="2.0.0")

# What AIMET cannot say: every scale is a power of two, and onnxruntime computes this file the same in every way.
from pow2quant import validate  # noqa: E402

found = validate(folder / "model.onnx", encodings=folder / "model.encodings")
print(f"{len(found.free_scales)} free scales; {found.agreements[0].differing} of {found.agreements[0].elements} differ")
print(found.certificate_sentence)
