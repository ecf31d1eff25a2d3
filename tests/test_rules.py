"""A rule of rounding that is wrong is noticed by every executor, where the operation stands; the right ones agree."""

from __future__ import annotations

import pytest

from pow2quant.errors import MissingExtraError
from tests.wrong_rules import CASES, agreements


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, case in CASES.items() for kind in (None, *case.nodes)]
)
def test_one_rule_that_is_wrong_is_noticed_where_it_stands(name, kind, tmp_path):
    try:
        found = agreements(name, kind, tmp_path)
    except MissingExtraError as error:
        pytest.skip(str(error))
    for agreement in found:
        if kind is None:
            assert agreement.differing == 0, agreement.first_diverging
        else:
            assert agreement.differing
            assert agreement.first_diverging.node in CASES[name].nodes[kind]
