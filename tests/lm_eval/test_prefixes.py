"""What is read once, and that nothing is lost by it."""

from __future__ import annotations

import numpy as np
import pytest

from memlong.lm_eval.prefixes import shared_prefixes


def read(groups, prompts):
    """How many tokens are read."""
    return sum(
        len(group.prefix) + sum(len(prompts[number]) - len(group.prefix) for number in group.prompts)
        for group in groups
    )


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_comes_once_and_begins_with_its_prefix(seed):
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(2, size=draw.integers(1, 12)).tolist() for _ in range(30)]
    groups = shared_prefixes(prompts)
    assert sorted(number for group in groups for number in group.prompts) == list(range(30))
    for group in groups:
        for number in group.prompts:
            assert tuple(prompts[number][: len(group.prefix)]) == group.prefix
            assert len(group.prefix) < len(prompts[number])
            assert len(group.prompts) == 1 or 2 * len(group.prefix) >= len(prompts[number])
    assert read(groups, prompts) <= sum(map(len, prompts))


def test_questions_on_one_text_read_it_once():
    shots = list(range(100))
    prompts = [[*shots, 200 + number % 3, 300 + number] for number in range(50)]
    (group,) = shared_prefixes(prompts)
    assert group.prefix == tuple(shots)
    assert len(group.prompts) == 50


def test_a_short_beginning_in_common_does_not_put_long_texts_into_a_draft():
    prompts = [[1, 2, 3, 4, *[number] * 40] for number in (7, 8)]
    assert [len(group.prompts) for group in shared_prefixes(prompts)] == [1, 1]


def test_nothing_is_nothing():
    assert shared_prefixes([]) == []
