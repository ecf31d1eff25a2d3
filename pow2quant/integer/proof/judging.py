"""How each ONNX operation is followed: from where its inputs lie to where its accumulator and its result lie.

The arguments behind the rules stand at the head of `certificate.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pow2quant.functions import definition
from pow2quant.integer.lattice import NotProvedError
from pow2quant.integer.nodes import COMPARISONS
from pow2quant.integer.proof.averages import average, divided, total_of
from pow2quant.integer.proof.definitions import defined_by
from pow2quant.integer.proof.elements import choice, product_of, sum_of
from pow2quant.integer.proof.moves import comparison, float_sums, function, moves, nothing, resize, unknown
from pow2quant.integer.proof.products import weighted
from pow2quant.integer.proof.requirements import (
    ROUNDS_AFTER_ZERO_POINT,
    require_bounded_requantization,
    require_even_zero_point,
    require_powers_of_two,
    require_rounded_in_place,
    require_simulated,
)
from pow2quant.integer.proof.tensors import Judged, Rule, Tensors
from pow2quant.operators import MOVES, OPERATIONS, Values
from pow2quant.rewrites import changed_value

if TYPE_CHECKING:
    import onnx


def judge(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Follows the values through a node. Raises NotProvedError when executors may disagree about its result."""
    require_powers_of_two(tensors, node)
    rule = defined_by if definition(node) is not None else RULES.get(node.op_type, unknown)
    accumulator, result = rule(tensors, node)
    if accumulator is not None:
        accumulator.require_exact(limit=tensors.limit)
        require_simulated(tensors, node, accumulator)
    if node.op_type in ROUNDS_AFTER_ZERO_POINT:
        require_even_zero_point(tensors, node, accumulator)
        require_rounded_in_place(tensors, node, accumulator)
    require_bounded_requantization(tensors, node, accumulator, result)
    if reason := changed_value(tensors.index, tensors.encodings, node):
        raise NotProvedError(reason, accumulator)
    return accumulator, result


_BY_VALUES: dict[Values, Rule] = {
    Values.SUMS_OF_PRODUCTS: weighted,
    Values.SUM: sum_of,
    Values.PRODUCT: product_of,
    Values.AVERAGE: average,
    Values.FUNCTION: function,
    Values.FLOAT: float_sums,
    Values.NONE: nothing,
    **dict.fromkeys((*MOVES, Values.CLIPPED, Values.JOINED), moves),
}

RULES: dict[str, Rule] = {
    **{op: _BY_VALUES[row.values] for op, row in OPERATIONS.items()},
    **dict.fromkeys(("Cast", *COMPARISONS), comparison),
    "Div": divided,
    "ReduceSum": total_of,
    "Resize": resize,
    "Where": choice,
}
"""How each operation is judged; any other is not proved."""
