"""InMemoryStore keeps blocks, all or nothing."""

from __future__ import annotations

import pytest
import torch

from memlong.bank import InMemoryStore
from memlong.errors import InvalidArgumentError


@pytest.fixture
def blocks():
    keys = torch.randn(4, 2, 3, 5, 7).bfloat16()
    return keys, keys * 2


@pytest.fixture
def store(blocks):
    made = InMemoryStore()
    made.put([10, 11, 12, 13], *blocks)
    return made


def test_blocks_come_back_in_the_order_asked_for(store, blocks):
    keys, values = store.get([12, 10, 12])
    assert torch.equal(keys, blocks[0][[2, 0, 2]])
    assert torch.equal(values, blocks[1][[2, 0, 2]])
    assert keys.is_contiguous()
    assert keys.dtype == torch.bfloat16


def test_it_counts_what_it_holds(store, blocks):
    assert len(store) == 4
    assert store.nbytes == sum(block.nbytes for block in blocks)
    store.remove([11, 13])
    assert len(store) == 2
    assert store.nbytes == sum(block.nbytes for block in blocks) // 2
    assert 10 in store
    assert 11 not in store
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


def test_blocks_are_copies_going_in_and_coming_out(store, blocks):
    before = blocks[0].clone()
    blocks[0].zero_()
    store.get([10])[0].zero_()
    assert torch.equal(store.get([10, 11, 12, 13])[0], before)


def test_a_block_of_a_view_does_not_keep_the_rest_alive():
    wide = torch.randn(1, 2, 1000, 3, 4)[:, :, ::100]
    store = InMemoryStore()
    store.put([0], wide, wide)
    assert store.get([0])[0].untyped_storage().nbytes() == wide.numel() * 4
    assert torch.equal(store.get([0])[0], wide)


def test_nothing_is_put_if_one_id_is_held(store, blocks):
    with pytest.raises(InvalidArgumentError, match=r"already holds ids \[11\]"):
        store.put([20, 11], blocks[0][:2], blocks[1][:2])
    assert 20 not in store
    assert len(store) == 4


def test_nothing_is_removed_if_one_id_is_unknown(store):
    with pytest.raises(InvalidArgumentError, match=r"no block for ids \[99\]"):
        store.remove([10, 99])
    assert 10 in store
    with pytest.raises(InvalidArgumentError, match=r"no block for ids \[98\]"):
        store.get([10, 98])
