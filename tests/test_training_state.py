"""The state of a training as a file: what went in comes out, and damage is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pow2quant.errors import FileFormatError
from pow2quant.training import checkpoint

numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


tensors = st.integers(0, 3).map(lambda n: torch.arange(12.0).view(3, 4)[:, :n])


states = st.recursive(
    numbers | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return a == b and type(a) is type(b)


@settings(max_examples=60)
@given(states)
def test_a_checkpoint_gives_back_what_went_in(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    checkpoint.dump(path, state)
    assert same(checkpoint.load(path), state)


def test_a_checkpoint_replaces_the_old_one_whole_and_damage_is_said(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    checkpoint.dump(path, {"a": torch.ones(3)})
    with pytest.raises(TypeError, match="object cannot be saved"):
        checkpoint.dump(path, {"a": object()})
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-5])
    for wrong in (path, tmp_path / "none", Path(__file__)):
        with pytest.raises(FileFormatError, match=r"not a checkpoint|cannot be read: no such file"):
            checkpoint.load(wrong)
