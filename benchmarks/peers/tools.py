"""What other quantizers make of a network: W8A8 and weights of 4 bits, each as its tool does it by default."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import vendors
from vendors import Array, Given, Run


class NotOfferedError(Exception):
    """The tool has no such width."""


def onnxruntime(given: Given, bits: int) -> Run:
    """quantize_static: QDQ, weights per channel, float scales."""
    if bits == 8:
        return vendors.onnxruntime(given)
    from onnxruntime.quantization import QuantType, quantize_static

    file = given.model.with_name("quantized.onnx")
    quantize_static(given.model, file, vendors.reader(given), per_channel=True, weight_type=QuantType.QInt4)
    return vendors.session_of(file)


def esp_ppq(given: Given, bits: int) -> Run:
    """Its setting for ESP-DL: scales of 2^k."""
    if bits != 8:
        raise NotOfferedError(f"no weights of {bits} bits")
    return vendors.esp_ppq(given)


def aimet(given: Given, bits: int) -> Run:
    """QuantSim with its default configuration: weights per channel, float scales, batch norm folded."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.quantsim import QuantizationSimModel

    image = torch.from_numpy(given.each[0])
    fold_all_batch_norms(given.network, image.shape, dummy_input=image)
    scheme = QuantScheme.post_training_tf_enhanced
    sim = QuantizationSimModel(given.network, image, scheme, default_param_bw=bits, config_file="default")
    with torch.no_grad():
        sim.compute_encodings(lambda model: [model(torch.from_numpy(image)) for image in given.each])
    return _of_torch(sim.model)


def brevitas(given: Given, bits: int) -> Run:
    """Its example of PTQ: scales of 2^k, weights per channel, bias correction."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    images = [(torch.from_numpy(image), None) for image in given.each]
    model = ptq_common.quantize_model(
        preprocess_for_quantize(given.network),
        backend="fx",
        weight_bit_width=bits,
        act_bit_width=8,
        bias_bit_width=32,
        weight_quant_granularity="per_channel",
        act_quant_percentile=99.999,
        act_quant_type="sym",
        scale_factor_type="po2_scale",
        quant_format="int",
    )
    ptq_common.calibrate(images, model)
    ptq_common.apply_bias_correction(images, model)
    return _of_torch(model.eval())


def mct(given: Given, bits: int) -> Run:
    """Sony's Model Compression Toolkit for its default target: activations of 2^k, weights per channel."""
    import model_compression_toolkit as toolkit
    from model_compression_toolkit.core.common.network_editors import NodeTypeFilter

    config = toolkit.core.CoreConfig()
    if bits != 8:
        held = {type(module) for module in given.network.modules()} & {torch.nn.Conv2d, torch.nn.Linear}
        kinds = [NodeTypeFilter(kind) for kind in sorted(held, key=str)]
        config.bit_width_config.set_manual_weights_bit_width(kinds, bits, "weight")

    def images() -> Iterator[list[Array]]:
        return ([image] for image in given.each)

    model, _ = toolkit.ptq.pytorch_post_training_quantization(given.network, images, core_config=config)
    return _of_torch(model)


TOOLS: dict[str, tuple[Callable[[Given, int], Run], str]] = {
    "mct": (mct, "model-compression-toolkit"),
    "brevitas": (brevitas, "brevitas"),
    "esp-ppq": (esp_ppq, "esp-ppq"),
    "onnxruntime": (onnxruntime, "onnxruntime"),
    "aimet": (aimet, "aimet-torch"),
}
"""By name: the function, and the package that quantizes."""


def _of_torch(model: torch.nn.Module) -> Run:
    def run(images: Array) -> Array:
        with torch.no_grad(), contextlib.suppress(StopIteration):
            found: Array = model(torch.from_numpy(images)).detach().cpu().numpy().astype(np.float32)
        return found

    return run
