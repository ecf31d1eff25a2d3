"""Encodings from files: which entry belongs to which site, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from pow2quant import foreign
from pow2quant.adapters import onnx_qdq
from pow2quant.artifact import Site
from pow2quant.backends.placement import Placement
from pow2quant.errors import EncodingError, FileFormatError, NotPowerOfTwoError
from pow2quant.pow2_constraints import Encoding, Format, Observed, choose
from pow2quant.quantsim.names import onnx_places, torch_places

if TYPE_CHECKING:
    import os

    from torch import fx


def document(encodings: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """The content of an encodings file with both of its parts, and its name. Raises FileFormatError."""
    source = "<encodings>"
    if not isinstance(encodings, Mapping):
        source = str(encodings)
        try:
            encodings = foreign.parsed(foreign.text(encodings, foreign.MOST_JSON))
        except ValueError as error:
            raise FileFormatError(f"{source}: cannot be read as an encodings file: {error}") from error
    if not isinstance(encodings, Mapping):
        raise FileFormatError(f"{source}: expected an object at the top")
    if "encodings" in encodings:
        return dict(encodings), source
    if not {"param_encodings", "activation_encodings"} & encodings.keys():  # AdaRound's, before AIMET 1.32
        encodings = {"param_encodings": encodings}
    return {"param_encodings": {}, "activation_encodings": {}, **encodings}, source


def beside(encodings: Any) -> Path | None:
    """The ONNX file that lies beside an encodings file under the same name, if there is one."""
    path = None if isinstance(encodings, Mapping) else Path(encodings).with_suffix(".onnx")
    return path if path is not None and path.is_file() else None


def onnx_model(model: ModelProto | str | os.PathLike[str] | None, encodings: Any) -> ModelProto | None:
    """The ONNX model that the file's names are from: the one given, or the file beside `encodings` of that name."""
    if isinstance(model, ModelProto):
        return model
    path = model or beside(encodings)
    return None if path is None else onnx_qdq.load(Path(path))


def by_site(
    table: Mapping[str, Encoding | None],
    network: fx.GraphModule,
    placement: Placement,
    roles: Collection[str],
    strict: bool,
    source: str,
    model: Callable[[], ModelProto | None],
) -> dict[Site, tuple[str, Encoding | None]]:
    """The file's name and encoding for every site, None for float. A tensor's own entry counts more than one passed on.

    model: reads the ONNX file, where names are not ours. Raises EncodingError for an entry of no site, where strict.
    """
    places = torch_places(network, placement)
    biases = {f"{y.module}.bias" for y in placement.layers}
    unknown = table.keys() - places.keys() - biases
    onnx = model() if unknown else None
    if onnx is not None:
        places |= onnx_places(network, placement, onnx)
    found: dict[Site, tuple[int, str, Encoding | None]] = {}
    for name, encoding in table.items():
        site, distance = places.get(name, (None, 0))
        if site is None and name not in biases and strict:
            raise EncodingError(f"{source}: {name}: the simulation has no quantizer for this tensor (strict=True)")
        if site is not None and site.role in roles and (site not in found or distance < found[site][0]):
            found[site] = (distance, name, encoding)
    return {site: (name, encoding) for site, (_, name, encoding) in found.items()}


def fitted(
    name: str, encoding: Encoding, site: Site, placement: Placement, network: fx.GraphModule, snap: bool
) -> Encoding:
    """The encoding as the site takes it: a power of two, and one scale per channel where the site has these.

    snap: a free scale becomes the smallest power of two that covers its range. Raises NotPowerOfTwoError otherwise.
    """
    spec = placement.specs[site.name]
    axis = next((y.axis for y in placement.layers if y.weight == site), None)
    if spec.power_of_2 and not encoding.is_power_of_two:
        if not snap:
            scale = float(encoding.scale[np.frexp(encoding.scale)[0] != 0.5].flat[0])
            raise NotPowerOfTwoError(f"{name}: scale {scale!r} is not a power of two (snap=True rounds it up to one)")
        low, high = (np.atleast_1d(v).astype(np.float32) for v in (encoding.minimum, encoding.maximum))
        form = Format(encoding.grid.bits, encoding.grid.signed, True, encoding.axis)
        encoding = choose("minmax", Observed(low, high, np.stack([low, high], 1)), form)
    channels = 1 if axis is None else network.get_parameter(site.name).shape[axis]
    if encoding.axis is not None and encoding.scale.size != channels:
        raise EncodingError(f"{name}: {encoding.scale.size} scales for {channels} channels")
    if axis is not None and encoding.axis is None:
        scales = np.full(channels, encoding.scale, np.float32)
        return Encoding(scales, np.full(channels, encoding.zero_point, np.int64), encoding.grid, axis)
    return encoding
