"""The public members of AIMET's `QuantizationSimModel` (aimet-torch 2.42), and what each is here."""

from __future__ import annotations

from typing import NamedTuple

SAME = "same"
NEEDS_AIMET = 'refused: AIMET\'s quantizer objects; use backend="aimet"'
INTERNAL = 'refused: a step of AIMET\'s own export; use backend="aimet", placement="aimet"'
NO_BATCH_NORM = 'refused: the network is prepared as a copy; use backend="aimet"'


class Member(NamedTuple):
    """What a member is with `backend="custom"`, with `"aimet"`, and with `"aimet"` and AIMET's own placement.

    "same", "differs: how" or "refused: why". With "same", results differ only in that scales are powers of two.
    """

    custom: str
    aimet: str
    placed: str = SAME


PREPARED = "differs: of the prepared network, batch norm folded, one quantizer per tensor"
SNAPPED = "differs: free scales are an error, unless snap=True; ONNX-named files and 2.0.0 load too"
SNAPPED_PLACED = "differs: a free scale becomes the smallest 2^k that covers, with a warning"

MEMBERS: dict[str, Member] = {
    "compute_encodings": Member(
        "differs: no data, NaN and infinity are errors; biases follow from the others",
        "differs: no data, NaN and infinity are errors; biases follow from the others",
        "differs: NaN, infinity and LPBQ are errors",
    ),
    "configure_quantization_ops": Member(NEEDS_AIMET, PREPARED),
    "exclude_layers_from_quantization": Member(NEEDS_AIMET, PREPARED),
    "exclude_param_from_quantization": Member(NEEDS_AIMET, PREPARED),
    "export": Member(
        "differs: written without torch's exporter; the batch stays free; 2.0.0 too; no .pth",
        "differs: written without torch's exporter; the batch stays free; 2.0.0 too; no .pth",
    ),
    "export_onnx_model_and_encodings": Member(INTERNAL, PREPARED),
    "export_torch_script_model_and_encodings": Member(INTERNAL, PREPARED),
    "export_weights_to_safetensors": Member(NEEDS_AIMET, PREPARED),
    "find_op_names_for_layer": Member(INTERNAL, SAME),
    "fold_param_quantizers": Member(NEEDS_AIMET, PREPARED),
    "get_activation_param_encodings": Member(NEEDS_AIMET, PREPARED),
    "get_original_model": Member(NO_BATCH_NORM, PREPARED),
    "get_supported_kernels": Member(NEEDS_AIMET, SAME),
    "load_and_freeze_encodings": Member(
        'refused: use load_encodings(…, allow_overwrite=False), or backend="aimet"',
        "differs: AIMET's own, on the prepared network; the smallest 2^k that covers is taken",
        SNAPPED_PLACED,
    ),
    "load_encodings": Member(SNAPPED, SNAPPED, SNAPPED_PLACED),
    "named_qmodules": Member(NEEDS_AIMET, PREPARED),
    "named_quantizer_parameters": Member(NEEDS_AIMET, PREPARED),
    "named_quantizers": Member(NEEDS_AIMET, PREPARED),
    "onnx": Member(
        "differs: written without torch's exporter; biases are in the file unless export_int32_bias=False",
        "differs: written without torch's exporter; biases are in the file unless export_int32_bias=False",
    ),
    "prepare_sim_for_compute_encodings": Member(INTERNAL, SAME),
    "qmodules": Member(NEEDS_AIMET, PREPARED),
    "quant_wrappers": Member(NEEDS_AIMET, PREPARED),
    "quantizer_parameters": Member(NEEDS_AIMET, PREPARED),
    "quantizer_state_dict": Member(NEEDS_AIMET, PREPARED),
    "quantizers": Member(NEEDS_AIMET, PREPARED),
    "run_modules_for_traced_custom_marker": Member(INTERNAL, SAME),
    "save_encodings_to_json": Member(SAME, SAME),
    "set_and_freeze_param_encodings": Member(SNAPPED, SNAPPED, SNAPPED_PLACED),
    "set_percentile_value": Member(
        'refused: our percentile is fixed; use backend="aimet", placement="aimet"',
        'refused: our percentile is fixed; use placement="aimet"',
    ),
}


def page() -> str:
    """The table in Markdown."""
    head = '| member | `backend="custom"` | `backend="aimet"` | and `placement="aimet"` |\n|---|---|---|---|\n'
    rows = (f"| `{name}` | {m.custom} | {m.aimet} | {m.placed} |\n" for name, m in MEMBERS.items())
    return head + "".join(rows)
