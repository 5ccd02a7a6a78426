"""A test that is marked pairwise keeps enough of its cases to see every two values of its parameters together."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest

CASES = [
    tuple(zip("abcd", values, strict=True)) for values in product("123456789", "xyz", ("off", "on"), "pqr")
]


@pytest.fixture
def covering(request):
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py"))).covering


def parts(cases, together):
    return {part for case in cases for part in combinations(case, together)}


@pytest.mark.parametrize(("together", "most"), [(1, 9), (2, 30)])
def test_few_cases_hold_what_all_of_them_hold(covering, together, most):
    chosen = [CASES[row] for row in covering(CASES, together=together)]
    assert parts(chosen, together) == parts(CASES, together)
    assert len(chosen) <= most


def test_what_cannot_be_thinned_stays(covering):
    assert covering([(("a", "1"),), (("a", "2"),)], together=2) == [0, 1]
    assert covering([()], together=2) == [0]
