"""A search among some chunks finds what a bank of these alone would."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memlong import create_bank
from memlong.bank import Draft
from memlong.bank.index import exact, ranking
from memlong.errors import InvalidArgumentError

METRICS = ["cosine", "inner_product", "l2"]
DIM = 3


def filled(count, seed=0, backend="torch", **options):
    """Numbers of few bits, so that many scores are equal."""
    bank = create_bank(backend, DIM, **options)
    vectors = torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, (count, DIM)).astype(np.float32))
    numbers = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    bank.add(vectors, numbers, -numbers, [(n, n + 1) for n in range(count)])
    return bank


def queries_of(count):
    return torch.from_numpy(np.random.default_rng(99).integers(-2, 3, (count, DIM)).astype(np.float32))


def plainly(bank, queries, k, among):
    """Rank everything, pass over what is not allowed, and fill up."""
    every = bank.exact_search(queries, max(1, len(bank)))
    allowed = set(np.asarray(among).tolist())
    for ids, scores in zip(every.ids.tolist(), every.scores.tolist(), strict=True):
        hits = [hit for hit in zip(ids, scores, strict=True) if hit[0] in allowed][:k]
        yield hits + [(-1, -math.inf)] * (k - len(hits))


def hits_of(found):
    return [
        list(zip(*row, strict=True)) for row in zip(found.ids.tolist(), found.scores.tolist(), strict=True)
    ]


@pytest.fixture(params=["as it is", "never by brute force", "row by row", "in place"])
def way(request, monkeypatch):
    """The ways there are to search some rows, of which small banks would take one."""
    for module, name, value in {
        "as it is": [],
        "never by brute force": [(ranking, "_ROWS_PER_CANDIDATE", 0)],
        "row by row": [(exact, "ROWS_PER_COPY", 0), (exact, "_VALUES_PER_GATHER", 1)],
        "in place": [(exact, "ROWS_PER_COPY", math.inf)],
    }[request.param]:
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # which changes no example
@given(
    metric=st.sampled_from(METRICS),
    count=st.integers(0, 60),
    gone=st.sets(st.integers(0, 59), max_size=5),
    among=st.lists(st.integers(-3, 70), max_size=80),
    k=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_it_finds_what_a_bank_of_these_alone_would(way, backend, metric, count, gone, among, k, seed):
    bank, queries = filled(count, seed, backend, metric=metric), queries_of(3)
    bank.remove([each for each in gone if each < count])
    wanted = list(plainly(bank, queries, k, among))
    assert hits_of(bank.search(queries, k, among=among)) == wanted
    assert hits_of(bank.exact_search(queries, k, among=among)) == wanted
    got = bank.retrieve(queries, k, among=among)
    assert hits_of(got) == wanted
    assert torch.equal(got.keys[got.found].flatten(), got.ids[got.found].float())
    found = [each for row in wanted for each, _ in row if each >= 0]
    assert bank.usage.retrievals.tolist() == [found.count(each) for each in bank.ids.tolist()]
    bank.remove([each for each in bank.ids.tolist() if each not in among])
    assert hits_of(bank.search(queries, k)) == wanted


@pytest.mark.parametrize("form", [torch.tensor, np.array, list, tuple, lambda ids: np.array(ids, np.int32)])
def test_ids_come_in_any_form_order_and_number(form):
    bank, queries = filled(20), queries_of(2)
    given = form([7, 3, 3, 99, 12])
    assert hits_of(bank.search(queries, 4, among=given)) == list(plainly(bank, queries, 4, [3, 7, 12]))


@pytest.mark.parametrize("nothing", [[], (), range(0), np.empty(0), torch.empty(0), [-1], [20, 2**62]])
def test_among_none_that_are_there_nothing_is_found(nothing):
    bank = filled(20)
    for method in (bank.search, bank.exact_search, bank.retrieve):
        found = method(queries_of(2), 3, among=nothing)
        assert found.ids.tolist() == [[-1] * 3] * 2
        assert found.scores.tolist() == [[-math.inf] * 3] * 2


@pytest.mark.parametrize("method", ["search", "exact_search", "retrieve"])
@pytest.mark.parametrize(
    ("among", "message"),
    [
        (3, r"among must have shape \[n\], got \[\]"),
        ([[1, 2]], r"among must have shape \[n\], got \[1, 2\]"),
        ([1.0], r"among must hold integers, got \[1.0\] of type list"),
        ({1, 2}, r"among must hold integers, got \{1, 2\} of type set"),
        (torch.ones(20, dtype=torch.bool), "among must hold integers, got Tensor of torch.bool"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(method, among, message):
    bank = filled(20)
    with pytest.raises(InvalidArgumentError, match=message):
        getattr(bank, method)(queries_of(1), 2, among=among)
    assert not bank.usage.retrievals.any()


def test_what_an_index_misses_among_the_allowed_is_found_by_brute_force(monkeypatch):
    """The best of all are not allowed, and so are all candidates for one query of two."""
    bank = create_bank("torch", 2, metric="inner_product")
    angles = torch.linspace(0, math.pi / 2, 3000)
    blocks = torch.zeros(3000, 1, 1, 1, 1)
    bank.add(torch.stack([angles.cos(), angles.sin()], dim=1), blocks, blocks, [(0, 1)] * 3000)
    asked, search = [], bank.index.search
    monkeypatch.setattr(bank.index, "search", lambda queries, k: asked.append(k) or search(queries, k))
    found = bank.search(torch.eye(2), 2, among=range(1500, 3000))
    assert found.ids.tolist() == [[1500, 1501], [2999, 2998]]
    assert asked == [24]
    found = bank.search(torch.eye(2), 2, among=range(1500, 1900))
    assert found.ids.tolist() == [[1500, 1501], [1899, 1898]]
    assert asked == [24]  # it is sooner to look at so few


@pytest.mark.parametrize(
    ("step", "allowed", "width"),
    [(9, 10, None), (9, 5_000, None), (9, 10_000, 240), (1, 10_000, None), (1, 20_000, 120), (1, 99_000, 25)],
)
def test_how_many_candidates_an_index_is_asked_for(step, allowed, width):
    assert ranking.width_among(8, np.arange(allowed) * step, 100_000) == width


def test_no_index_is_asked_for_more_than_any_has():
    assert ranking.width_among(1000, np.arange(900_000), 1_000_000) is None
    assert ranking.width_among(1000, np.arange(990_000), 1_000_000) == 2029


@pytest.mark.parametrize(
    ("backend", "options"), [("torch", {}), ("faiss", {}), ("hnswlib", {"initial_capacity": 8})]
)
@pytest.mark.parametrize("rows_per_candidate", [0, 48])
def test_nothing_else_is_found_while_another_thread_writes(backend, options, rows_per_candidate, monkeypatch):
    monkeypatch.setattr(ranking, "_ROWS_PER_CANDIDATE", rows_per_candidate)
    bank, done = create_bank(backend, DIM, max_chunks=60, **options), Event()

    def write():
        try:
            for first in range(0, 400, 5):
                numbers = torch.arange(first, first + 5, dtype=torch.float32).view(-1, 1, 1, 1, 1)
                vectors = torch.randn(5, DIM, generator=torch.Generator().manual_seed(first))
                bank.add(vectors, numbers, -numbers, [(n, n + 1) for n in range(first, first + 5)])
                if first % 25 == 0:
                    bank.remove(bank.ids[1:3])
        finally:
            done.set()

    def read():
        searches = 0
        while not done.is_set() or not searches:
            among = bank.ids[searches % 2 :: 2]
            got = bank.retrieve(queries_of(3), 6, among=among)
            assert torch.isin(got.ids[got.found], among).all()
            assert torch.equal(got.keys[got.found].flatten(), got.ids[got.found].float())
            assert (got.scores[:, 1:] <= got.scores[:, :-1]).all()
            searches += 1

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        pool.submit(write).result()
        for reader in readers:
            reader.result()


def test_a_draft_is_searched_whatever_may_be_found_of_its_bank():
    bank = filled(9)
    draft = Draft(bank)
    own, block = draft.next_id, torch.zeros(1, 1, 1, 1, 1)
    draft.add(torch.ones(1, DIM), block, block, [(9, 10)])
    query = torch.ones(1, DIM)
    assert draft.search(query, 3, among=[2, 4]).ids.sort().values.tolist() == [[2, 4, own]]
    assert draft.search(query, 2, among=[]).ids.tolist() == [[own, -1]]
    with pytest.raises(InvalidArgumentError, match="among must hold integers"):
        draft.search(query, 2, among=[0.5])
