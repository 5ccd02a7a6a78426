"""What users type as K=V is text where JSON cannot be made of it, whatever it is."""

from __future__ import annotations

import pytest

from memlong.settings import key_values


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000, '{"a":', "HNSW32", ""])
def test_what_is_no_json_stays_text(value):
    assert key_values("--backend-option", [f"a={value}"]) == {"a": value}


def test_what_is_json_becomes_it():
    assert key_values("--backend-option", ["a=3", "b-c=true"]) == {"a": 3, "b_c": True}


def test_hyphens_of_the_name_before_a_dot_stay():
    given = ["sentence-transformers.piece-tokens=8"]
    assert key_values("--retriever-option", given) == {"sentence-transformers.piece_tokens": 8}
