"""Recall of a search, by score."""

from __future__ import annotations

import pytest
import torch

from memlong import create_bank
from memlong.errors import InvalidArgumentError
from memlong.evaluation import recall_at_k


@pytest.fixture
def bank():
    made = create_bank("torch", 4, metric="inner_product")
    blocks = torch.ones(5, 1, 1, 1, 1)
    made.add(torch.tensor([1.0, 3, 2, 2, 0])[:, None] * torch.eye(4)[0], blocks, blocks, [[0, 1]] * 5)
    return made


@pytest.mark.parametrize(
    ("scores", "k", "share"),
    [
        ([3.0, 2.0], 2, 1.0),
        ([3.0, 2.0, 2.0], 2, 1.0),  # of equals, any counts
        ([3.0, 1.0], 2, 0.5),
        ([2.0 - 1e-7, 0.0, 0.0], 3, 1 / 3),
        ([], 2, 0.0),
        ([3.0, 2.0, 2.0, 1.0, 0.0], 9, 1.0),  # there are no more
    ],
)
def test_what_is_as_good_as_the_kth_best_counts(bank, scores, k, share):
    assert recall_at_k(bank, torch.eye(4)[0], torch.tensor(scores), k) == pytest.approx(share)


def test_of_an_empty_bank_all_is_found():
    assert recall_at_k(create_bank("torch", 4), torch.eye(4)[0], torch.empty(0), 3) == 1.0


def test_a_k_that_is_none_is_refused(bank):
    with pytest.raises(InvalidArgumentError, match="k must be an integer of at least 1"):
        recall_at_k(bank, torch.eye(4)[0], torch.empty(0), 0)
