"""Small networks of kinds that people write and that `benchmarks/zoo.py` is not known for: exact, or refused in a line.

python benchmarks/zoo.py benchmarks/odd_networks.py --results odd.jsonl --page docs/odd-networks.md \\
    --title "Odd networks that were tried"
"""

from __future__ import annotations

from odd import ZOO, attention, code, formulas, places, sequences, vision

__all__ = ["ZOO", "attention", "code", "formulas", "places", "sequences", "vision"]
