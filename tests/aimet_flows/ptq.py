# ruff: noqa: F821 (`folder` is given)
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.common.defs import QuantScheme
from aimet_torch.cross_layer_equalization import equalize_model
from torch.utils.data import DataLoader

from tests.aimet_flows.digits import accuracy, images, trained

model = trained()
float_accuracy = accuracy(model)
dummy_input = torch.randn(1, 1, 8, 8)
fold_all_batch_norms(model, input_shapes=(1, 1, 8, 8))
equalize_model(model, input_shapes=(1, 1, 8, 8))

parameters = AdaroundParameters(data_loader=DataLoader(images(), 64), num_batches=4, default_num_iterations=50)
model = Adaround.apply_adaround(
    model, dummy_input, parameters, path=folder, filename_prefix="adaround", default_param_bw=4,
    default_quant_scheme=QuantScheme.post_training_tf_enhanced,
)  # fmt: skip

sim = QuantizationSimModel(
    model, dummy_input, quant_scheme=QuantScheme.min_max, default_param_bw=4, default_output_bw=8, config_file="default"
)
sim.set_and_freeze_param_encodings(encoding_path=f"{folder}/adaround.encodings")


def calibrate(model, loader):
    with torch.no_grad():
        for x in loader:
            model(x)


sim.compute_encodings(calibrate, DataLoader(images(), 64))
assert accuracy(sim.model) > float_accuracy - 0.05
sim.export(path=folder, filename_prefix="model", dummy_input=dummy_input)
