"""Each policy against a reference of a few lines, alone and through a bank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlong import create_bank
from memlong.bank import EvictionPolicy, Usage, bank_of, eviction_policy
from memlong.bank.eviction import POLICIES
from memlong.errors import InvalidArgumentError, UnknownNameError
from memlong_torch.index import TorchIndex

TorchBank = bank_of(TorchIndex)


def fifo(chunks, capacity):
    return chunks[len(chunks) - capacity :]


def lru(chunks, capacity):
    newest_use_first = sorted(chunks, key=lambda c: (c["used"], c["id"]), reverse=True)
    return sorted(newest_use_first[:capacity], key=lambda c: c["id"])


def retrieval_frequency(chunks, capacity):
    tenth = math.ceil(0.1 * len(chunks))
    kept = chunks[tenth:]
    protected = {c["id"] for c in chunks[-tenth:]}
    for chunk in sorted(kept, key=lambda c: (c["count"], c["id"])):
        if len(kept) <= max(capacity // 2, min(capacity, 1)):
            break
        if chunk["id"] not in protected:
            kept = [c for c in kept if c is not chunk]
    return fifo(kept, capacity) if len(kept) > capacity else kept


REFERENCES = {"fifo": fifo, "lru": lru, "retrieval_frequency": retrieval_frequency}


def test_every_policy_has_a_reference():
    assert {policy.name for policy in POLICIES} == set(REFERENCES)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(REFERENCES)),
    rows=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=80
    ),
    data=st.data(),
)
def test_policies_choose_what_the_reference_does(name, rows, data):
    capacity = data.draw(st.integers(0, len(rows) - 1))
    ids = np.cumsum([gap for gap, _, _ in rows])
    counts, uses = (np.array([row[column] for row in rows]) for column in (1, 2))
    chosen = eviction_policy(name).select(Usage(ids, counts, uses), capacity)
    chunks = [
        {"id": int(i), "count": int(c), "used": int(u)} for i, c, u in zip(ids, counts, uses, strict=True)
    ]
    kept = [chunk["id"] for chunk in REFERENCES[name](chunks, capacity)]
    assert sorted(chosen.tolist()) == sorted(set(ids.tolist()) - set(kept))
    assert len(kept) <= capacity


class Model:
    """A bank as a list of dictionaries."""

    def __init__(self, name, capacity):
        self.policy, self.capacity, self.chunks, self.next, self.clock = REFERENCES[name], capacity, [], 0, 0

    def add(self, count):
        self.clock += 1
        for _ in range(count):
            self.chunks.append({"id": self.next, "count": 0, "used": self.clock})
            self.next += 1
        if len(self.chunks) > self.capacity:
            self.chunks = self.policy(self.chunks, self.capacity)

    def evict(self, count):
        left = max(len(self.chunks) - count, 0)
        if count and self.chunks:
            self.chunks = self.policy(self.chunks, left)

    def retrieved(self, ids):
        self.clock += 1
        for chunk in self.chunks:
            if (times := ids.count(chunk["id"])) > 0:
                chunk["count"] += times
                chunk["used"] = self.clock

    def remove(self, chunk_id):
        self.chunks = [chunk for chunk in self.chunks if chunk["id"] != chunk_id]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 15)),
        st.tuples(st.just("retrieve"), st.integers(1, 4)),
        st.tuples(st.just("evict"), st.integers(0, 5)),
        st.tuples(st.just("remove"), st.integers(0, 50)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(REFERENCES)), capacity=st.integers(1, 25), steps=STEPS)
def test_a_bank_evicts_as_the_model_does(name, capacity, steps):
    """Any sequence of adds, retrievals, evictions and removals leaves the same chunks with the same counts."""
    bank, model = TorchBank(4, max_chunks=capacity, eviction=name), Model(name, capacity)
    for step, number in steps:
        if step == "add":
            blocks = torch.ones(number, 1, 1, 1, 1)
            bank.add(torch.randn(number, 4), blocks, blocks, [[0, 1]] * number)
            model.add(number)
        elif step == "retrieve":
            model.retrieved(bank.retrieve(torch.randn(number, 4), 3).ids.ravel().tolist())
        elif step == "evict":
            bank.evict(number)
            model.evict(number)
        elif len(bank):
            chunk_id = int(bank.ids[number % len(bank)])
            bank.remove([chunk_id])
            model.remove(chunk_id)
        usage = bank.usage
        assert usage.ids.tolist() == [chunk["id"] for chunk in model.chunks]
        assert usage.retrievals.tolist() == [chunk["count"] for chunk in model.chunks]


def test_the_papers_rule_in_numbers():
    """Of 101 chunks over a capacity of 100: 11 oldest dropped, 11 newest kept, and the middle down to 50."""
    counts = np.zeros(101, dtype=np.int64)
    counts[[0, 20, 40]] = [99, 5, 5]
    chosen = eviction_policy("retrieval_frequency").select(Usage(np.arange(101), counts, counts), 100)
    assert sorted(set(range(101)) - set(chosen.tolist())) == [20, 40, *range(53, 101)]


def test_policies_may_be_instances_and_names_are_checked():
    policy = eviction_policy("lru")
    assert eviction_policy(policy) is policy
    with pytest.raises(
        UnknownNameError, match=r"'retrieval-frequency'\. Did you mean 'retrieval_frequency'\?"
    ):
        eviction_policy("retrieval-frequency")
    with pytest.raises(UnknownNameError, match="There are: fifo, lru, retrieval_frequency"):
        eviction_policy("zzz")
    with pytest.raises(InvalidArgumentError, match="EvictionPolicy instance, got 3"):
        eviction_policy(3)


class Chooses(EvictionPolicy):
    name = "chooses"

    def __init__(self, ids):
        self.ids = np.array(ids, dtype=np.int64)

    def select(self, usage, capacity):
        return self.ids


@pytest.mark.parametrize("ids", [[], [99], [0, 99], [0, 0]])
def test_a_policy_that_breaks_its_contract_is_named_and_nothing_is_added(ids):
    bank = TorchBank(4, max_chunks=3, eviction=Chooses(ids))
    blocks = torch.ones(3, 1, 1, 1, 1)
    bank.add(torch.randn(3, 4), blocks, blocks, [[0, 1]] * 3)
    with pytest.raises(InvalidArgumentError, match="Chooses must choose at least 2 of 5 chunks"):
        bank.add(torch.randn(2, 4), blocks[:2], blocks[:2], [[0, 1]] * 2)
    assert bank.ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", ["1kB", 1000, np.int64(1000), " 1 KB "])
def test_a_limit_in_bytes_is_written_as_people_do(size):
    assert create_bank("torch", 8, max_bytes=size).state.capacity.max_bytes == 1000


@pytest.mark.parametrize("size", ["8 gigs", "", 0, "0GB", -1, True, 1.5, "1e9", "9" * 30])
def test_a_limit_that_is_no_size_is_refused(size):
    with pytest.raises(
        InvalidArgumentError, match=r"max_bytes must be a size in bytes of at least 1.*, such as .*, got"
    ):
        create_bank("torch", 8, max_bytes=size)
