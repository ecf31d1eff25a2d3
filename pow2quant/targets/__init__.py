"""Targets: the arithmetic of the runtime or chip that a network is for, and which plans it takes."""

from pow2quant.targets.description import DEFAULT, WIDTHS, Limits, Roundings, Target
from pow2quant.targets.reading import is_file, load, note, of, presets

__all__ = ["DEFAULT", "WIDTHS", "Limits", "Roundings", "Target", "is_file", "load", "note", "of", "presets"]
