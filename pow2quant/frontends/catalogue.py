"""What a prepared network may hold: the tables of modules and of PyTorch's operations as text."""

from __future__ import annotations

from pow2quant.frontends.aten import ROWS
from pow2quant.frontends.operators import OPERATORS

COLUMNS = ("module", "in ONNX", "integers", "claim", "what it computes")
"""integers: whether the engine and C compute it on integers alone (in one and two dimensions, for layers and pools).
claim: of onnxruntime, for sums within the certificate's bounds."""


def modules() -> list[tuple[str, str, str, str, str]]:
    """A row of `COLUMNS` for every module, sorted by name."""
    rows = []
    for cls, row in OPERATORS.items():
        own = cls.__module__.startswith("torch.")
        about = "PyTorch's" if own else (cls.__doc__ or "").strip().partition("\n")[0]
        name = f"torch.nn.{cls.__name__}" if own else cls.__name__
        integers, claim = "yes" if row.integers else "no", "proved" if row.proved else "observed"
        rows.append((name, row.onnx, integers, claim, about))
    return sorted(rows, key=lambda r: r[0].rpartition(".")[2].lower())


def operations() -> list[str]:
    """PyTorch's operations (aten) that are understood, sorted."""
    return sorted(ROWS)
