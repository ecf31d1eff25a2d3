"""LSTM, GRU, RNN and Attention of an ONNX file, as PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pow2quant.frontends.onnx.step import Row, Step, tensor

DEFAULT = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
"""The activations that PyTorch computes with, too."""


def _recurrent(order: tuple[int, ...], function: Callable[..., Any], pair: bool = False) -> Row:
    """order: in which PyTorch stores the file's gates. pair: the state is a pair."""

    def row(s: Step, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, *states: Any) -> Any:
        _check(s, x, lengths, states, pair)
        by_batch = bool(s.attribute("layout", 0))
        x = tensor(x).transpose(0, 1) if by_batch else tensor(x)
        hidden, directions = int(s.attribute("hidden_size", r.shape[-1])), len(w)
        shape = (directions, x.shape[1], hidden)
        given = [None if h is None else tensor(h) for h in (*states, None, None)[: 2 if pair else 1]]
        first = [x.new_zeros(shape) if h is None else h.transpose(0, 1) if by_batch else h for h in given]
        parameters = []
        for d in range(directions):
            weights = [w[d], r[d]] + ([] if b is None else list(tensor(b)[d].chunk(2)))
            parameters += [_ordered(tensor(v), order) for v in weights]
        backward = s.attribute("direction", "forward") == "reverse"
        y, *last = function(
            x.flip(0) if backward else x, tuple(first) if pair else first[0], parameters,
            b is not None, 1, 0.0, False, directions == 2, False,
        )  # fmt: skip
        y = (y.flip(0) if backward else y).unflatten(2, (directions, hidden)).transpose(1, 2)
        results = [y.permute(2, 0, 1, 3), *(h.transpose(0, 1) for h in last)] if by_batch else [y, *last]
        return tuple(results) if len(s.node.output) > 1 else results[0]

    return row


def _ordered(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    parts = weight.chunk(len(order))
    return torch.cat([parts[i] for i in order])


def _check(s: Step, x: Any, lengths: Any, states: tuple[Any, ...], pair: bool) -> None:
    """Raises UnsupportedModelError for what PyTorch's layers do not compute."""
    kind = s.node.op_type
    names = s.attribute("activations", []) or list(DEFAULT[kind])
    known = [["Tanh"], ["Relu"]] if kind == "RNN" else [list(DEFAULT[kind])]
    count = len(DEFAULT[kind])
    if any(names[i : i + count] != names[:count] for i in range(0, len(names), count)) or names[:count] not in known:
        raise s.error(f"activations {', '.join(names)} are not supported; supported: {', '.join(known[0])}")
    if s.attribute("clip") is not None or s.attribute("input_forget", 0) or len(states) > (2 if pair else 1):
        raise s.error("clip, input_forget and peephole weights are not supported")
    if kind == "GRU" and not s.attribute("linear_before_reset", 0):
        raise s.error("linear_before_reset=0 is not supported; Keras exports reset_after=True with 1, PyTorch always")
    steps = x.shape[1 if s.attribute("layout", 0) else 0]
    if lengths is not None and (isinstance(lengths, Tensor) or np.any(np.asarray(lengths) != steps)):
        raise s.error("sequences of different lengths (sequence_lens) are not supported; leave the operand out")


def _plain(s: Step, *operands: Any) -> Any:
    relu = (s.attribute("activations") or ["Tanh"])[0] == "Relu"
    return _recurrent((0,), torch.rnn_relu if relu else torch.rnn_tanh)(s, *operands)


def _cell(function: Callable[..., Any], states: int = 1) -> Row:
    """One step, as `patterns` finds it. states: how many there are; constant zeros have any batch size."""

    def row(s: Step, x: Any, *rest: Any) -> Any:
        weights = [tensor(w) for w in rest[states:]]
        sizes = len(x), weights[1].shape[1]
        given = [x.new_zeros(sizes) if isinstance(h, np.ndarray) and not h.any() else tensor(h) for h in rest[:states]]
        return function(x, given if states > 1 else given[0], *weights)

    return row


def _plain_cell(s: Step, *operands: Any) -> Any:
    relu = s.attribute("activation") == "Relu"
    return _cell(torch.rnn_relu_cell if relu else torch.rnn_tanh_cell)(s, *operands)


def _attention(s: Step, query: Any, key: Any, value: Any, mask: Any = None, *past: Any) -> Tensor:
    """Of (N, heads, T, C), or (N, T, heads * C) with the attributes that say how many heads."""
    if any(p is not None for p in past) or s.attribute("softcap", 0.0) or sum(map(bool, s.node.output)) > 1:
        raise s.error("a past, softcap and further results are not supported")
    query, key, value = (tensor(x) for x in (query, key, value))
    flat = query.ndim == 3
    if flat:
        heads = [s.attribute("q_num_heads"), *2 * [s.attribute("kv_num_heads")]]
        parts = zip((query, key, value), heads, strict=True)
        query, key, value = (x.unflatten(2, (h, -1)).transpose(1, 2) for x, h in parts)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    mask = None if mask is None else tensor(mask)
    causal = bool(s.attribute("is_causal", 0))
    result = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=s.attribute("scale"))
    return result.transpose(1, 2).flatten(2) if flat else result


ROWS: dict[str, Row] = {
    "LSTM": _recurrent((0, 2, 3, 1), torch.lstm, pair=True), "GRU": _recurrent((1, 0, 2), torch.gru), "RNN": _plain,
    "LSTMCell": _cell(torch.lstm_cell, 2), "GRUCell": _cell(torch.gru_cell), "RNNCell": _plain_cell,
    "Attention": _attention,
}  # fmt: skip
