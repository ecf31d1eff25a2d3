"""The public members of AIMET's `QuantizationSimModel` (aimet-torch 2.42), and what each is here."""

from __future__ import annotations

from typing import NamedTuple

SAME = "same"
NEEDS_AIMET = 'refused: AIMET\'s quantizer objects; use backend="aimet"'
INTERNAL = 'refused: a step of AIMET\'s own export; use backend="aimet"'
COPIED = 'refused: the network is prepared as a copy; use backend="aimet"'
PREPARED = "differs: of the prepared network, batch norm folded, one quantizer per tensor"
OURS = "differs: of the prepared network; quantizers of our own with AIMET's attributes"
SNAPPED = "differs: free scales are an error, unless snap=True; ONNX-named files and 2.0.0 load too"
COVERED = "differs: a free scale becomes the smallest 2^k that covers, with a warning"
CHECKED = "differs: no data, NaN and infinity are errors; biases follow from the others"
WRITTEN = "differs: the prepared network, written without torch's exporter"


class Member(NamedTuple):
    """What a member is with `backend="custom"`, with `"aimet"`, and with `"aimet"` and our placement.

    "same", "differs: how" or "refused: why". With "same", results differ only in that scales are powers of two.
    """

    custom: str
    aimet: str = SAME
    prepared: str = PREPARED


MEMBERS: dict[str, Member] = {
    "compute_encodings": Member(CHECKED, "differs: NaN, infinity and LPBQ are errors", CHECKED),
    "configure_quantization_ops": Member(NEEDS_AIMET),
    "exclude_layers_from_quantization": Member(OURS),
    "exclude_param_from_quantization": Member(OURS),
    "export": Member(WRITTEN, SAME, WRITTEN),
    "export_onnx_model_and_encodings": Member(INTERNAL),
    "export_torch_script_model_and_encodings": Member(INTERNAL),
    "export_weights_to_safetensors": Member(NEEDS_AIMET),
    "find_op_names_for_layer": Member(INTERNAL, SAME, SAME),
    "fold_param_quantizers": Member("differs: weights are put on their grids; their quantizers stay"),
    "get_activation_param_encodings": Member(PREPARED),
    "get_original_model": Member(COPIED),
    "get_supported_kernels": Member(NEEDS_AIMET, SAME, SAME),
    "load_and_freeze_encodings": Member(SNAPPED, COVERED, SNAPPED),
    "load_encodings": Member(SNAPPED, COVERED, SNAPPED),
    "named_qmodules": Member(NEEDS_AIMET),
    "named_quantizer_parameters": Member(NEEDS_AIMET),
    "named_quantizers": Member(OURS),
    "onnx": Member(WRITTEN, SAME, WRITTEN),
    "prepare_sim_for_compute_encodings": Member(INTERNAL, SAME, SAME),
    "qmodules": Member(NEEDS_AIMET),
    "quant_wrappers": Member(NEEDS_AIMET),
    "quantizer_parameters": Member(NEEDS_AIMET),
    "quantizer_state_dict": Member(NEEDS_AIMET),
    "quantizers": Member(OURS),
    "run_modules_for_traced_custom_marker": Member(INTERNAL, SAME, SAME),
    "save_encodings_to_json": Member(SAME, SAME, SAME),
    "set_and_freeze_param_encodings": Member(SNAPPED, COVERED, SNAPPED),
    "set_percentile_value": Member(SAME, SAME, SAME),
}


def page() -> str:
    """The table in Markdown."""
    head = '| member | `backend="custom"` | `backend="aimet"` | and `placement="pow2quant"` |\n|---|---|---|---|\n'
    rows = (f"| `{name}` | {m.custom} | {m.aimet} | {m.prepared} |\n" for name, m in MEMBERS.items())
    return head + "".join(rows)
