# ruff: noqa: F821 (`folder` is given)
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.batch_norm_fold import fold_all_batch_norms

from tests.aimet_flows.digits import accuracy, images, train, trained

model = trained().eval()
dummy_input = torch.randn(1, 1, 8, 8)
fold_all_batch_norms(model, input_shapes=(1, 1, 8, 8))
sim = QuantizationSimModel(model, dummy_input, default_param_bw=3, default_output_bw=8)
sim.compute_encodings(lambda model: model(images()))
before = accuracy(sim.model)
train(sim.model, 3, 1e-3)
after = accuracy(sim.model)
assert after >= before
sim.save_encodings_to_json(folder, "encodings")
sim.onnx.export((dummy_input,), f=f"{folder}/model.onnx", encoding_version="1.0.0", dynamo=False)
