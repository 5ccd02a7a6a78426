"""Any sequence of calls leaves a bank that a dictionary can follow, on every backend."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memlong import Registry
from memlong.bank import TieredStore

REGISTRY = Registry()
DIM, SHAPE = 6, (1, 2, 2, 3)
BACKENDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "torch": ("torch", {}, True),
    "faiss": ("faiss", {}, True),
    "faiss-hnsw": ("faiss", {"index": "HNSW16"}, False),
    "faiss-ivf": ("faiss", {"index": "IVF4,Flat", "train_size": 12, "nprobe": 4}, True),
    "hnswlib": ("hnswlib", {"initial_capacity": 4}, False),
}


def vectors(numbers) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.random.default_rng(each).normal(size=DIM) for each in numbers]))


def blocks(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, *SHAPE)


class BankMachine(RuleBasedStateMachine):
    """The model: by id, the number that a chunk was made of, and how often it was retrieved."""

    backend: str

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.held: dict[int, list[int]] = {}
        self.saved: dict[int, list[int]] | None = None
        self.next_id = self.saved_next_id = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(
        metric=st.sampled_from(["cosine", "inner_product", "l2"]), most=st.sampled_from([None, 9, 30])
    )
    def begin(self, metric, most) -> None:
        name, options, self.exact = BACKENDS[self.backend]
        self.most, self.options = most, options
        self.bank = REGISTRY.create_bank(name, DIM, metric=metric, max_chunks=most, **options)

    @rule(count=st.integers(1, 14))
    def add(self, count) -> None:
        numbers = list(range(self.next_id, self.next_id + count))
        ids = self.bank.add(
            vectors(numbers), blocks(numbers), -blocks(numbers), [(n, n + 2) for n in numbers]
        )
        assert ids.tolist() == numbers
        self.held |= {number: [number, 0] for number in numbers}
        self.next_id += count
        if self.most is not None:
            self.held = dict(list(self.held.items())[-self.most :])

    @rule(seed=st.integers(0, 50), k=st.integers(1, 40))
    def search(self, seed, k) -> None:
        query = vectors([10**6 + seed])
        found, exact = self.bank.search(query, k), self.bank.exact_search(query, k)
        have = min(k, len(self.held))
        assert found.ids.shape == (1, k)
        assert (found.ids[0, have:] == -1).all()
        assert len(set(found.ids[0, :have].tolist()) & self.held.keys()) == have
        if self.exact or k >= len(self.held):
            assert torch.equal(found.ids, exact.ids)
            assert torch.equal(found.scores, exact.scores)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), k=st.integers(1, 5))
    def retrieve(self, data, k) -> None:
        wanted = data.draw(st.sampled_from(sorted(self.held)))
        got = self.bank.retrieve(vectors([wanted]), k)
        found = [each for each in got.ids[0].tolist() if each >= 0]
        assert (got.keys[0, : len(found)] == blocks(found)).all()
        assert (got.values[0, : len(found)] == -blocks(found)).all()
        for each in found:
            self.held[each][1] += 1

    @rule(n=st.integers(0, 12))
    def evict(self, n) -> None:
        gone = sorted(self.held)[:n]
        assert self.bank.evict(n).tolist() == gone
        self.forget(gone)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data) -> None:
        gone = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, max_size=6))
        self.bank.remove(gone)
        self.forget(gone)

    @rule()
    def reset(self) -> None:
        self.bank.reset()
        self.held = {}

    @rule(compact=st.booleans())
    def save(self, compact) -> None:
        self.bank.save(Path(self.folder.name, "bank"), compact=compact)
        self.saved = {chunk_id: list(facts) for chunk_id, facts in self.held.items()}
        self.saved_next_id, self.saved_exact = self.next_id, self.exact

    @precondition(lambda self: self.saved is not None)
    @rule(kind=st.sampled_from(["plain", "lazy", "trusting", "on disk"]))
    def load(self, kind) -> None:
        options: dict[str, Any] = {"lazy": kind == "lazy", "trust_index": kind == "trusting"}
        if kind == "on disk":
            options["store"] = TieredStore(disk=self.folder.name)
        self.bank = REGISTRY.load_bank(Path(self.folder.name, "bank"), **options)
        self.exact = self.saved_exact
        self.go_back()

    @precondition(lambda self: self.saved is not None)
    @rule(other=st.sampled_from(sorted(BACKENDS)))
    def load_into_another_backend(self, other) -> None:
        name, options, self.exact = BACKENDS[other]
        self.bank = REGISTRY.load_bank(Path(self.folder.name, "bank"), name, **options)
        self.go_back()

    def go_back(self) -> None:
        """To what was saved; what is saved now and then is of any backend."""
        self.held = {chunk_id: list(facts) for chunk_id, facts in self.saved.items()}
        self.next_id = self.saved_next_id

    def forget(self, ids) -> None:
        for each in ids:
            del self.held[each]

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "bank"):
            return
        usage = self.bank.usage
        assert dict(zip(usage.ids.tolist(), usage.retrievals.tolist(), strict=True)) == {
            chunk_id: count for chunk_id, (_, count) in self.held.items()
        }
        assert self.bank.next_id == self.next_id
        assert len(self.bank) == len(self.bank.state.store) == len(self.held)


@pytest.mark.slow
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_dictionary_can_follow(backend):
    machine = type("Machine", (BankMachine,), {"backend": backend})
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
