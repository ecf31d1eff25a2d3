"""The members of the drop-in that read and write files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pow2quant.adapters import aimet_encodings
from pow2quant.artifact import Artifact
from pow2quant.backends.base import ALL, Batch
from pow2quant.errors import ConfigError, EncodingError
from pow2quant.quantsim import export, loading
from pow2quant.quantsim.members import Members
from pow2quant.quantsim.names import channel_axis
from pow2quant.saving import write

if TYPE_CHECKING:
    import os

    from onnx import ModelProto


class Files(Members):
    """Encodings are loaded, saved and exported."""

    @property
    def quant_args(self) -> dict[str, Any]:
        """What an encodings file says of the arguments."""
        raise NotImplementedError

    def load_encodings(
        self,
        encodings: Mapping[str, Any] | str | os.PathLike[str],
        strict: bool = True,
        partial: bool = True,
        requires_grad: bool | None = None,
        allow_overwrite: bool | None = True,
        *,
        model: ModelProto | str | os.PathLike[str] | None = None,
        snap: bool = False,
    ) -> None:
        """Takes encodings from a file or its content: versions 0.6.1, 1.0.0, 2.x, named after torch or ONNX.

        strict: an entry that fits no quantizer is an error, otherwise it is left out. partial: quantizers without an
        entry keep what they have, otherwise they stay float until `compute_encodings`. requires_grad, allow_overwrite:
        as AIMET has them (None: unchanged). model: the ONNX file that the tensors' names are from; without one, the
        file beside `encodings` that is called alike. snap: free scales become the smallest powers of two that cover
        their range.
        What the file says to be float stays float. Biases follow from the others. Raises FileFormatError, EncodingError
        naming the tensor that does not fit, NotPowerOfTwoError naming the one whose scale is free.
        """
        self._load(encodings, ALL, strict, partial, requires_grad, allow_overwrite, model, snap)

    def set_and_freeze_param_encodings(self, encoding_path: str | os.PathLike[str], *, snap: bool = False) -> None:
        """Takes the weights' encodings of a file (of `save_encodings_to_json`, `export`, AdaRound) for good.

        Afterwards `compute_encodings` leaves them, and the weights, bit-identical.
        """
        content, _ = loading.document(encoding_path)
        content.pop("activation_encodings", None)
        self._load(content, {"weight"}, True, True, False, False, loading.beside(encoding_path), snap)

    def load_and_freeze_encodings(
        self,
        encoding_path: Mapping[str, Any] | str | os.PathLike[str],
        ignore_when_quantizer_disabled: bool = False,
        *,
        snap: bool = False,
    ) -> None:
        """`load_encodings` for good: afterwards nothing changes what was loaded."""
        self._load(encoding_path, ALL, not ignore_when_quantizer_disabled, True, False, False, None, snap)

    def _load(
        self,
        encodings: Mapping[str, Any] | str | os.PathLike[str],
        roles: Collection[str],
        strict: bool,
        partial: bool,
        requires_grad: bool | None,
        allow_overwrite: bool | None,
        model: ModelProto | str | os.PathLike[str] | None,
        snap: bool,
    ) -> None:
        document, source = loading.document(encodings)
        placement, network = self.simulation.placement, self.simulation.network
        axes = {y.weight.name: channel_axis(network, y.module) for y in placement.layers if y.weight is not None}
        table = aimet_encodings.read_all(document, source, axes)
        if table and not any(table.values()):
            raise EncodingError(f"{source}: all entries are float; there is nothing to load")
        found = loading.by_site(
            table, network, placement, roles, strict, source, lambda: loading.onnx_model(model, encodings)
        )
        self._mark((), requires_grad, allow_overwrite)
        free = {site: entry for site, entry in found.items() if site.name not in self.frozen}
        fitted = {
            site.name: loading.fitted(name, encoding, site, placement, network, snap)
            for site, (name, encoding) in free.items()
            if encoding is not None
        }
        for site in [site for site, (_, encoding) in free.items() if encoding is None]:
            self.change(site, None)
        widths = {s: e.grid.width for s, (_, e) in free.items() if e is not None and e.grid.width != self.spec(s).bits}
        if widths:
            self._changes |= {site: replace(self.spec(site), bits=bits) for site, bits in widths.items()}
            self._replan()
        kept = {name: e for name, e in self.encodings().items() if partial or name in self.frozen}
        self.simulation.load(kept | fitted)
        self.derive_biases()
        self.encodings()
        self._mark(fitted, requires_grad, allow_overwrite)

    def save_encodings_to_json(self, path: str | os.PathLike[str], filename_prefix: str) -> None:
        """Writes `<path>/<filename_prefix>.json`: the encodings named after the modules, as AIMET does (0.6.1)."""
        write(Path(path) / f"{filename_prefix}.json", export.torch_named(self).encode())

    def get_activation_param_encodings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The encodings of activations and of weights, as `save_encodings_to_json` writes them."""
        document = json.loads(export.torch_named(self))
        return document["activation_encodings"], document["param_encodings"]

    @property
    def onnx(self) -> export.OnnxExporter:
        """`sim.onnx.export(args, f, …)`: float ONNX and encodings."""
        return export.OnnxExporter(self)

    def export(
        self,
        path: str | os.PathLike[str],
        filename_prefix: str,
        dummy_input: Tensor | Sequence[Tensor],
        onnx_export_args: Any = None,
        propagate_encodings: bool = False,
        export_to_torchscript: bool = False,
        use_embedded_encodings: bool = False,
        export_model: bool = True,
        filename_prefix_encodings: str | None = None,
        apply_param_qdq: bool = True,
        *,
        encoding_version: str | None = None,
    ) -> None:
        """Writes `<prefix>.onnx` (float, weights on their grids), `<prefix>.encodings` and `<prefix>_torch.encodings`.

        onnx_export_args: AIMET's `OnnxExportApiArgs`, or a mapping with `input_names`, `output_names`, `opset_version`,
        `dynamic_axes`. encoding_version: None for AIMET's global one.
        Raises ConfigError for AIMET's other options, unless they have their defaults; OutputError.
        """
        others = {
            "propagate_encodings": propagate_encodings,
            "export_to_torchscript": export_to_torchscript,
            "use_embedded_encodings": use_embedded_encodings,
            "apply_param_qdq": not apply_param_qdq,
        }
        for key, asked in others.items():
            if asked:
                raise ConfigError(f'export: {key}={key != "apply_param_qdq"} is not supported; use backend="aimet"')
        stem = filename_prefix_encodings or filename_prefix
        version = encoding_version or export.default_version()
        export.pair(self, Path(path), filename_prefix, dummy_input, onnx_export_args, export_model, stem, version)

    def artifact(self, example: Tensor | Sequence[Tensor]) -> Artifact:
        """The float ONNX and its table, as every exporter takes it."""
        self.derive_biases()
        batch: Batch = tuple(example) if isinstance(example, (tuple, list)) else example  # type: ignore[assignment]
        return self.simulation.export(batch)

    def _mark(self, names: Collection[str], requires_grad: bool | None, allow_overwrite: bool | None) -> None:
        if requires_grad:
            raise ConfigError('requires_grad: only backend="aimet" trains encodings')
        if allow_overwrite is not None:
            self.frozen = self.frozen - set(names) if allow_overwrite else self.frozen | set(names)
