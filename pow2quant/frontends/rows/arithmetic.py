"""Sums and products of tensors."""

from __future__ import annotations

from pow2quant.frontends import modules as m
from pow2quant.frontends.writing import Operator, Rows, plain

ROWS: Rows = {
    m.Add: Operator("Add", plain("Add"), integers=True, proved=True),
    m.Sub: Operator("Sub", plain("Sub"), integers=True, proved=True),
    m.Mul: Operator("Mul", plain("Mul"), integers=True, proved=True),
    m.MatMul: Operator("MatMul", plain("MatMul"), integers=True, proved=True),
}
