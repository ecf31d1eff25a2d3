# ruff: noqa: F821 (`folder` is given)
import torch
from aimet_torch import QuantizationSimModel

from tests.aimet_flows.digits import accuracy, images, trained

model = trained()
dummy_input = torch.randn(1, 1, 8, 8)
sim = QuantizationSimModel(model, dummy_input, quant_scheme="tf_enhanced", default_param_bw=8, default_output_bw=8)


def calibrate(model):
    for x in images().split(64):
        model(x)


sim.compute_encodings(calibrate)
assert accuracy(sim.model) > accuracy(model) - 0.02
sim.onnx.export(
    dummy_input, f"{folder}/model.onnx", input_names=["input"], output_names=["output"], encoding_version="2.0.0",
    dynamo=False,
)  # fmt: skip
