"""The trained network of the drop-in's tests, and how they run it."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from pow2quant import QuantizationSimModel
from pow2quant.adapters import aimet_encodings, onnx_qdq
from tests.aimet_flows.digits import images, trained

prepared = partial(QuantizationSimModel, placement="pow2quant")
DUMMY = torch.zeros(1, 1, 8, 8)


def table(sim):
    return sim.simulation.encodings()


def run(model, x=None):
    with torch.no_grad():
        return model(images() if x is None else x).clone()


def in_onnxruntime(model, encodings, x):
    """What onnxruntime makes of a pair of files, without and with optimizations: two results."""
    loaded = onnx_qdq.load(Path(model))
    entries = aimet_encodings.load(Path(encodings), aimet_encodings.channel_axes(loaded))
    text = onnx_qdq.to_qdq(aimet_encodings.apply(loaded, entries)).SerializeToString()
    results = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.add_session_config_entry("session.x64quantprecision", "1")  # x86 without VNNI saturates otherwise
        session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
        entering = session.get_inputs()[0]
        size = entering.shape[0] if isinstance(entering.shape[0], int) else len(x)
        parts = [session.run(None, {entering.name: part.numpy()})[0] for part in x.split(size)]
        results.append(np.concatenate(parts))
    return results


def folded():
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    model = trained().eval()
    fold_all_batch_norms(model, None, DUMMY)
    return model


CONFIG = {
    "defaults": {
        "ops": {"is_output_quantized": "True"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "per_channel_quantization": "False",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {"Conv": {"per_channel_quantization": "True"}},
    "supergroups": [{"op_list": ["Conv", "Relu"]}, {"op_list": ["Conv", "Clip"]}, {"op_list": ["Gemm", "Relu"]}],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def changed(path, value):
    document = copy.deepcopy(CONFIG)
    *parents, key = path
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    return document
