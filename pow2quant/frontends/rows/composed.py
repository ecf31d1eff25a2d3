"""Functions of one tensor that ONNX, or an executor in double, has no operation for: written as several."""

from __future__ import annotations

from pow2quant.frontends import modules as m
from pow2quant.frontends.writing import Formula, Operator, Rows, formula, plain
from pow2quant.functions import TINY

FLOAT, INT64 = 1, 7
"""ONNX's numbers of element types."""


def not_below(f: Formula, x: str, bound: float) -> str:
    """max(x, bound)."""
    return f("Max", x, f.number(bound))


def nonzero(f: Formula, x: str) -> str:
    """x, zeros replaced by a tiny number."""
    return f("Where", f("Equal", x, f.number(0)), f.number(TINY), x)


def times(f: Formula, x: str, factor: float) -> str:
    """factor * x; nothing where the factor is one."""
    return x if factor == 1 else f("Mul", x, f.number(factor))


def product(f: Formula, a: str, b: str) -> str:
    """a @ b, and a node that does nothing: onnxruntime's MatMulScaleFusion would round a factor behind to float32."""
    return f("Max", f("MatMul", a, b))


def _softplus(f: Formula, x: str) -> str:
    decayed = f("Exp", f("Neg", f("Abs", x)))
    return f("Add", not_below(f, x, 0), f("Log", f("Add", decayed, f.number(1))))


def _log(f: Formula, module: m.Log, x: str) -> str:
    x = f("Add", x, f.number(module.offset)) if module.offset else x
    return times(f, f("Log", not_below(f, x, TINY)), module.factor)


def _pow(f: Formula, module: m.Pow, x: str) -> str:
    x = x if module.exponent.is_integer() else not_below(f, x, 0)
    return f("Pow", nonzero(f, x) if module.exponent < 0 else x, f.number(module.exponent))


def _rsqrt(f: Formula, module: m.Rsqrt, x: str) -> str:
    return f("Div", f.number(1), f("Sqrt", not_below(f, x, TINY)))


def _floor_divide(f: Formula, module: m.FloorDivide, x: str) -> str:
    return f("Floor", f("Div", x, f.number(module.divisor)))


def _remainder(f: Formula, module: m.Remainder, x: str) -> str:
    return f("Sub", x, f("Mul", _floor_divide(f, module, x), f.number(module.divisor)))


def _trunc(f: Formula, x: str) -> str:
    return f("Mul", f("Sign", x), f("Floor", f("Abs", x)))


def _trunc_divide(f: Formula, module: m.TruncDivide, x: str) -> str:
    return _trunc(f, f("Div", x, f.number(module.divisor)))


def _fmod(f: Formula, module: m.Fmod, x: str) -> str:
    return f("Sub", x, f("Mul", _trunc_divide(f, module, x), f.number(module.divisor)))


def _scaled_elu(f: Formula, module: m.ScaledELU, x: str) -> str:
    narrowed = f("Div", f("Min", x, f.number(0)), f.number(module.width))
    negative = f("Mul", f("Sub", f("Exp", narrowed), f.number(1)), f.number(module.alpha))
    return f("Mul", f("Add", not_below(f, x, 0), negative), f.number(module.scale))


def _softshrink(f: Formula, module: m.Softshrink, x: str) -> str:
    return f("Sub", x, f("Clip", x, f.number(-module.bound), f.number(module.bound)))


def _threshold(f: Formula, module: m.Threshold, x: str) -> str:
    larger = f("Greater", f("Abs", x) if module.magnitude else x, f.number(module.threshold))
    return f("Where", larger, x, f.number(module.value))


def _clamp(f: Formula, module: m.Clamp, x: str) -> str:
    bounds = ["" if bound is None else f.number(bound) for bound in (module.low, module.high)]
    return f("Clip", x, *(bounds if bounds[1] else bounds[:1]))


def compared(f: Formula, relation: str, x: str, y: str) -> str:
    """1 where the relation holds, else 0."""
    found = f("Not", f("Equal", x, y)) if relation == "NotEqual" else f(relation, x, y)
    return f("Cast", found, to=FLOAT)


def _compare(f: Formula, module: m.Compare, x: str) -> str:
    return compared(f, module.relation, x, f.number(module.number))


ROWS: Rows = {
    m.Abs: Operator("Abs", plain("Abs"), integers=True, proved=True),
    m.Sign: Operator("Sign", plain("Sign"), integers=True, proved=True),
    m.Floor: Operator("Floor", plain("Floor"), integers=True, proved=True),
    m.Ceil: Operator("Ceil", plain("Ceil"), integers=True, proved=True),
    m.Round: Operator("Round", plain("Round"), integers=True, proved=True),
    m.Sin: Operator("Sin", plain("Sin"), integers=True, proved=True),
    m.Cos: Operator("Cos", plain("Cos"), integers=True, proved=True),
    m.Tan: Operator("Tan", plain("Tan"), integers=True, proved=True),
    m.Atan: Operator("Atan", plain("Atan"), integers=True, proved=True),
    m.Sinh: Operator("Sinh", plain("Sinh"), integers=True, proved=True),
    m.Cosh: Operator("Cosh", plain("Cosh"), integers=True, proved=True),
    m.Asinh: Operator("Asinh", plain("Asinh"), integers=True, proved=True),
    m.Erf: Operator("Erf", plain("Erf"), integers=True, proved=True),
    m.Expm1: Operator(
        "Sub", formula(lambda f, module, x: f("Sub", f("Exp", x), f.number(1))), integers=True, proved=True
    ),
    m.Trunc: Operator("Mul", formula(lambda f, module, x: _trunc(f, x)), integers=True, proved=True),
    m.TruncDivide: Operator("Mul", formula(_trunc_divide), integers=True, proved=True),
    m.Fmod: Operator("Sub", formula(_fmod), integers=True, proved=True),
    m.Exp: Operator(
        "Exp", formula(lambda f, module, x: f("Exp", times(f, x, module.factor))), integers=True, proved=True
    ),
    m.Log: Operator("Log", formula(_log), integers=True, proved=True),
    m.Pow: Operator("Pow", formula(_pow), integers=True, proved=True),
    m.Sqrt: Operator("Sqrt", formula(lambda f, module, x: f("Sqrt", not_below(f, x, 0))), integers=True, proved=True),
    m.Rsqrt: Operator("Div", formula(_rsqrt), integers=True, proved=True),
    m.Reciprocal: Operator(
        "Div", formula(lambda f, module, x: f("Div", f.number(1), nonzero(f, x))), integers=True, proved=True
    ),
    m.FloorDivide: Operator("Floor", formula(_floor_divide), integers=True, proved=True),
    m.Remainder: Operator("Sub", formula(_remainder), integers=True, proved=True),
    m.Softplus: Operator(
        "Div",
        formula(lambda f, module, x: f("Div", _softplus(f, times(f, x, module.beta)), f.number(module.beta))),
        integers=True,
        proved=True,
    ),
    m.LogSigmoid: Operator(
        "Neg", formula(lambda f, module, x: f("Neg", _softplus(f, f("Neg", x)))), integers=True, proved=True
    ),
    m.Mish: Operator(
        "Mul", formula(lambda f, module, x: f("Mul", x, f("Tanh", _softplus(f, x)))), integers=True, proved=True
    ),
    m.Softsign: Operator(
        "Div", formula(lambda f, module, x: f("Div", x, f("Add", f("Abs", x), f.number(1)))), integers=True, proved=True
    ),
    m.Tanhshrink: Operator("Sub", formula(lambda f, module, x: f("Sub", x, f("Tanh", x))), integers=True, proved=True),
    m.ScaledELU: Operator("Mul", formula(_scaled_elu), integers=True, proved=True),
    m.Softshrink: Operator("Sub", formula(_softshrink), integers=True, proved=True),
    m.Threshold: Operator("Where", formula(_threshold), integers=True, proved=True),
    m.Clamp: Operator("Clip", formula(_clamp), integers=True, proved=True),
    m.Compare: Operator("Cast", formula(_compare), integers=True, proved=True),
}
