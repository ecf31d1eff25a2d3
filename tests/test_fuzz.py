"""A short run of `benchmarks/fuzz.py`: random networks of both kinds, in which nothing proved may differ."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_checks import KINDS, check

WIDTHS = {"any width": range(2, 17), "8 bits": (8,)}


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's, for even kernels
@settings(max_examples=30, derandomize=True)
@given(number=st.integers(0, 2**31))
def test_what_is_proved_never_differs(kind: str, widths: range, number: int) -> None:
    outcome = check(kind, 1, number, widths)
    assert not outcome.wrong, (outcome.proved, outcome.differing, outcome.failed)
