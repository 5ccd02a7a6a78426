"""Layers answer as one bank would that holds all their chunks, and only the top ever changes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memlong import BankPool, LayeredBank, SnapshotError, create_bank, load_bank
from memlong.bank import Draft, TieredStore
from memlong.bank.snapshot.tending import compact, describe, verify
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.testing.harness import DIM, random_chunks, random_vectors

TOP = 1 << 52
SECOND = 1 << 40


def filled(count, seed, backend="torch", **options):
    bank = create_bank(backend, DIM, **options)
    if count:
        random_chunks(count, seed=seed, first=1000 * seed).into(bank)
    return bank


class LayersMachine(RuleBasedStateMachine):
    """Layers beside one bank: whatever is done to both, they say the same, by ids that stand for one another."""

    backend = "torch"
    searches: tuple[str, ...] = ("search", "exact_search")

    @initialize(
        sizes=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        metric=st.sampled_from(["cosine", "inner_product", "l2"]),
        eviction=st.sampled_from(["fifo", "lru"]),
    )
    def begin(self, sizes, metric, eviction):
        bases = [filled(size, seed, self.backend, metric=metric) for seed, size in enumerate(sizes, start=1)]
        self.merged = create_bank(self.backend, DIM, metric=metric)
        self.named: list[int] = []  # by the id in the merged bank
        for number, size in enumerate(sizes):
            if size:
                random_chunks(size, seed=number + 1, first=1000 * (number + 1)).into(self.merged)
            self.named += range(number * SECOND, number * SECOND + size)
        top = create_bank(self.backend, DIM, metric=metric, eviction=eviction)
        self.layered = LayeredBank(top, bases)
        self.below = [base.ids.tolist() for base in bases]
        self.added = 0

    def other(self, ids):
        """Ids of the merged bank as the layered one has them."""
        return [self.named[each] if each >= 0 else -1 for each in ids]

    def own(self):
        """Ids of the top's chunks, in both banks."""
        mine = [each for each in self.merged.ids.tolist() if self.named[each] >= TOP]
        return mine, self.other(mine)

    @rule(count=st.integers(1, 4), seed=st.integers(0, 50))
    def add(self, count, seed):
        chunks = random_chunks(count, seed=seed, first=100 * seed)
        ids = chunks.into(self.layered).tolist()
        assert ids == [*range(TOP + self.added, TOP + self.added + count)]
        chunks.into(self.merged)
        self.named += ids
        self.added += count

    @rule(seed=st.integers(0, 9), queries=st.integers(1, 3), k=st.integers(1, 12))
    def search(self, seed, queries, k):
        wanted = random_vectors(queries, seed=seed)
        for name in self.searches:
            found, expected = getattr(self.layered, name)(wanted, k), getattr(self.merged, name)(wanted, k)
            assert found.ids.tolist() == [self.other(row) for row in expected.ids.tolist()]
            assert torch.equal(found.scores, expected.scores)

    @rule(seed=st.integers(0, 9), k=st.integers(1, 6), picks=st.lists(st.integers(0, 40), max_size=9))
    def search_among(self, seed, k, picks):
        here = [each for each in picks if each < len(self.named)]
        wanted = random_vectors(2, seed=seed)
        for name in self.searches:
            found = getattr(self.layered, name)(wanted, k, among=[*self.other(here), TOP - 5])
            expected = getattr(self.merged, name)(wanted, k, among=here)
            assert found.ids.tolist() == [self.other(row) for row in expected.ids.tolist()]
            assert torch.equal(found.scores, expected.scores)

    @precondition(lambda self: "search" in self.searches)
    @rule(seed=st.integers(0, 9), queries=st.integers(1, 3), k=st.integers(1, 12))
    def retrieve(self, seed, queries, k):
        wanted = random_vectors(queries, seed=seed)
        found, expected = self.layered.retrieve(wanted, k), self.merged.retrieve(wanted, k)
        assert found.ids.tolist() == [self.other(row) for row in expected.ids.tolist()]
        for name in ("scores", "keys", "values", "spans"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name

    @rule(picks=st.lists(st.integers(0, 40), max_size=6, unique=True))
    def fetch(self, picks):
        here = [each for each in picks if each < len(self.named)]
        found, expected = self.layered.fetch([*self.other(here), TOP - 1]), self.merged.fetch([*here, 99999])
        assert found.ids.tolist() == self.other(expected.ids.tolist())
        for name in ("keys", "values", "spans"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(self.layered.spans_of(self.other(here)), self.merged.spans_of(here))
        assert torch.equal(
            self.layered.embeddings_of([*self.other(here), TOP - 1]),
            self.merged.embeddings_of([*here, 99999]),
        )

    @precondition(lambda self: len(self.layered.top))
    @rule(data=st.data())
    def remove(self, data):
        mine, theirs = self.own()
        place = data.draw(st.integers(0, len(mine) - 1))
        self.layered.remove([theirs[place]])
        self.merged.remove([mine[place]])

    @rule(n=st.integers(0, 3))
    def evict(self, n):
        gone = self.layered.evict(n).tolist()
        assert all(each >= TOP for each in gone)
        self.merged.remove([self.named.index(each) for each in gone])

    @invariant()
    def holds_the_same(self):
        assert len(self.layered) == len(self.merged)
        assert self.layered.ids.tolist() == self.other(self.merged.ids.tolist())
        assert torch.equal(self.layered.embeddings.embeddings, self.merged.embeddings.embeddings)
        torch.testing.assert_close(
            self.layered.mean_embedding(), self.merged.mean_embedding(), rtol=1e-5, atol=1e-6
        )
        assert [base.ids.tolist() for base in self.layered.bases] == self.below
        assert self.layered.usage.ids.tolist() == self.own()[1]


class FaissMachine(LayersMachine):
    backend = "faiss"


class HnswMachine(LayersMachine):
    backend = "hnswlib"
    searches = ("exact_search",)  # its own is approximate, and differs between one graph and several


for machine, examples in ((LayersMachine, 25), (FaissMachine, 8), (HnswMachine, 8)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=12, deadline=None)
TestLayers, TestLayersFaiss, TestLayersHnsw = (
    LayersMachine.TestCase,
    FaissMachine.TestCase,
    HnswMachine.TestCase,
)


def test_means_are_those_of_one_bank_where_only_some_embeddings_count():
    sizes = (700, 1, 900, 13)
    layered = LayeredBank(filled(sizes[-1], 4), [filled(size, seed) for seed, size in enumerate(sizes[:-1])])
    merged = create_bank("torch", DIM)
    for seed, size in [*enumerate(sizes[:-1]), (4, sizes[-1])]:
        random_chunks(size, seed=seed, first=1000 * seed).into(merged)
    torch.testing.assert_close(layered.mean_embedding(), merged.mean_embedding())
    more = random_vectors(5).numpy()
    torch.testing.assert_close(layered.mean_embedding(more), merged.mean_embedding(more))


def test_ids_tell_the_layer_and_stay_when_a_base_grows():
    first, second = filled(2, 1), filled(3, 2)
    layered = LayeredBank(filled(1, 3), [first, second])
    assert layered.ids.tolist() == [0, 1, SECOND, SECOND + 1, SECOND + 2, TOP]
    assert layered.layer_of(layered.ids).tolist() == [0, 0, 1, 1, 1, 2]
    assert layered.layer_of([-1, 7 << 40]).tolist() == [-1, -1]
    random_chunks(1, seed=9).into(first)
    assert layered.ids.tolist() == [0, 1, 2, SECOND, SECOND + 1, SECOND + 2, TOP]
    assert TOP < 2**53  # as JavaScript reads numbers


def test_sessions_over_one_base_do_not_see_one_another():
    base = filled(3, 1)
    one, two = (LayeredBank(create_bank("torch", DIM), [base]) for _ in range(2))
    random_chunks(2, seed=5).into(one)
    assert (len(one), len(two), len(base)) == (5, 3, 3)
    assert two.search(random_chunks(2, seed=5).embeddings, 9).ids.max() < SECOND
    assert one.nbytes == one.top.nbytes
    assert two.nbytes == 0


def test_a_session_finds_only_what_is_open_to_it():
    bases = [filled(5, 1), filled(4, 2)]
    layered = LayeredBank(filled(1, 3), bases, among=[[1, 3, 99], None])
    expected = [1, 3, SECOND, SECOND + 1, SECOND + 2, SECOND + 3, TOP]
    assert sorted(layered.search(random_vectors(1), 7).ids[0].tolist()) == expected
    assert layered.retrieve(random_vectors(1), 8).found.sum() == 7
    assert layered.search(random_vectors(1), 3, among=[0, 3, TOP]).ids.sort().values.tolist() == [
        [-1, 3, TOP]
    ]
    closed = LayeredBank(create_bank("torch", DIM), bases, among=[[], []])
    assert not closed.retrieve(random_vectors(1), 3).found.any()
    with pytest.raises(InvalidArgumentError, match=r"for each of the 2 bases, got \[None\]"):
        LayeredBank(create_bank("torch", DIM), bases, among=[None])


def test_a_draft_lies_over_layers():
    draft = Draft(LayeredBank(filled(1, 3), [filled(2, 1)]))
    added = random_chunks(1, seed=7)
    draft.add(added.embeddings, added.keys, added.values, added.spans)
    assert draft.search(added.embeddings, 4).ids[0, 0] == draft.next_id - 1
    assert sorted(draft.search(added.embeddings, 3).ids[0].tolist())[:1] < [TOP]
    assert len(draft) == 4
    assert torch.equal(draft.fetch([draft.next_id - 1, TOP, 0]).keys[0], added.keys[0])


def test_bases_are_not_changed_from_above():
    base = filled(3, 1, max_chunks=3)
    layered = LayeredBank(filled(2, 2, max_chunks=2), [base])
    random_chunks(2, seed=5).into(layered)  # over the top's capacity, not the base's
    assert layered.ids.tolist() == [0, 1, 2, TOP + 2, TOP + 3]
    with pytest.raises(InvalidArgumentError, match=r"ids \[1\] are not of the top.*nothing was removed"):
        layered.remove([TOP + 2, 1])
    assert layered.evict(9).tolist() == [TOP + 2, TOP + 3]
    layered.reset()
    assert layered.ids.tolist() == [0, 1, 2]
    layered.refuse_changes("no")
    with pytest.raises(MemlongError, match="no"):
        random_chunks(1).into(layered)
    random_chunks(1).into(base)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: LayeredBank(base, "banks"), "bases must be a sequence of banks"),
        (lambda base: LayeredBank(base, [3]), "top and bases must be banks, got 3"),
        (lambda base: LayeredBank(base, [base]), "hold one bank twice"),
        (lambda base: LayeredBank(filled(0, 0), [LayeredBank(filled(0, 0), [base])]), "not be layered"),
        (lambda base: LayeredBank(filled(0, 0, metric="l2"), [base]), "top's dim 24 and metric 'l2'"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InvalidArgumentError, match=message.replace("24", str(DIM))):
        make(filled(2, 1))


def test_chunks_of_another_shape_or_model_are_refused():
    base = filled(2, 1)
    odd = random_chunks(1)
    layered = LayeredBank(create_bank("torch", DIM), [base])
    with pytest.raises(InvalidArgumentError, match="chunk shape"):
        layered.add(odd.embeddings, odd.keys[:, :1], odd.values[:, :1], odd.spans)
    assert len(layered.top) == 0
    base.origin = {"model": "a"}
    assert layered.origin == {"model": "a"}
    other = filled(1, 2)
    other.origin = {"model": "b"}
    with pytest.raises(InvalidArgumentError, match="of one model with the same settings"):
        LayeredBank(create_bank("torch", DIM), [base, other])


def test_it_is_not_copied():
    layered = LayeredBank(filled(1, 1), [filled(1, 2)])
    for each in (copy.deepcopy, pickle.dumps):
        with pytest.raises(MemlongError, match=r"copy bank\.top"):
            each(layered)
    assert len(copy.deepcopy(layered.top)) == 1


@pytest.mark.parametrize("lazy", [False, True])
def test_a_session_saves_its_top_and_what_its_bases_are(tmp_path, lazy):
    bases = [filled(3, 1), filled(0, 2), filled(2, 3)]
    for number, base in enumerate(bases):
        base.save(tmp_path / f"base {number}")
    session = LayeredBank(filled(2, 4), bases)
    session.save(tmp_path / "session")
    random_chunks(1, seed=8).into(session)
    session.save(tmp_path / "session")
    assert [each["bases"] for each in describe(tmp_path / "session")["banks"]] == [[3, 0, 2]]
    assert verify(tmp_path / "session")["banks"][0]["chunks"] == 3
    compact(tmp_path / "session")
    again = [load_bank(tmp_path / f"base {number}", lazy=True) for number in range(3)]
    assert [base.fingerprint() for base in again] == [base.fingerprint() for base in bases]
    loaded = load_bank(tmp_path / "session", bases=again, lazy=lazy)
    assert isinstance(loaded, LayeredBank)
    query = random_vectors(2)
    found, expected = loaded.retrieve(query, 9), session.retrieve(query, 9)
    for name in ("ids", "scores", "keys", "values", "spans"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_session_is_loaded_over_its_own_bases_only_unless_asked(tmp_path):
    base = filled(3, 1)
    session = LayeredBank(filled(2, 4), [base])
    session.save(tmp_path / "session")
    with pytest.raises(SnapshotError, match=r"was saved over 1 bases, got 0: pass those as bases"):
        load_bank(tmp_path / "session")
    with pytest.raises(SnapshotError, match=r"was saved over 1 bases, which it does not hold.*load_bank"):
        type(base).load(tmp_path / "session")
    with pytest.raises(SnapshotError, match=r"another base 0, of 3 chunks, got one of 4"):
        load_bank(tmp_path / "session", bases=[filled(4, 1)])
    changed = load_bank(tmp_path / "session", bases=[filled(4, 1)], any_bases=True)
    assert changed.ids.tolist() == [0, 1, 2, 3, TOP, TOP + 1]
    alone = load_bank(tmp_path / "session", any_bases=True)
    assert alone.ids.tolist() == [0, 1]
    alone.save(tmp_path / "alone")
    assert load_bank(tmp_path / "alone", bases=[filled(4, 1)]).ids.tolist() == [0, 1, 2, 3, TOP, TOP + 1]


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_a_session_is_loaded_over_its_base_whatever_that_holds_by_now(tmp_path, is_reloaded):
    base = filled(6, 1)
    base.save(tmp_path / "base")
    session = LayeredBank(filled(2, 4), [base])
    session.save(tmp_path / "session")
    base.remove([1, 5])
    assert random_chunks(3, seed=7, first=7000).into(base).tolist() == [6, 7, 8]  # no id is given twice
    base.save(tmp_path / "base")
    base = load_bank(tmp_path / "base", lazy=True) if is_reloaded else base
    fresh = LayeredBank(filled(2, 4), [base])
    loaded = load_bank(tmp_path / "session", bases=[base])
    assert loaded.ids.tolist() == [0, 2, 3, 4, 6, 7, 8, TOP, TOP + 1]
    query = random_vectors(2)
    found, expected = loaded.retrieve(query, 9), fresh.retrieve(query, 9)
    for name in ("ids", "scores", "keys", "values", "spans"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    base.reset()
    assert load_bank(tmp_path / "session", bases=[base]).ids.tolist() == [TOP, TOP + 1]


def test_a_bank_keeps_its_identity(tmp_path):
    bank = filled(3, 1)
    assert bank.identity != filled(3, 1).identity
    for each in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):  # noqa: S301
        assert each.identity == bank.identity
    for folder in ("one", "one", "two"):
        random_chunks(1, seed=9).into(bank)
        bank.save(tmp_path / folder)
        assert load_bank(tmp_path / folder).identity == bank.identity
    compact(tmp_path / "one")
    assert load_bank(tmp_path / "one", backend="faiss").identity == bank.identity
    assert LayeredBank(bank, [filled(2, 2)]).identity == bank.identity


def test_a_session_keeps_what_is_open_to_it(tmp_path):
    bases = [filled(5, 1), filled(4, 2)]
    session = LayeredBank(filled(1, 3), bases, among=[[3, 1, 3, 99], None])
    session.save(tmp_path / "session")
    loaded = load_bank(tmp_path / "session", bases=bases)
    assert [each if each is None else each.tolist() for each in loaded.among] == [[1, 3, 99], None]
    assert 0 not in loaded.search(random_vectors(1), 10).ids
    random_chunks(1, seed=9).into(bases[0])
    assert load_bank(tmp_path / "session", bases=bases).among[0] is not None
    compact(tmp_path / "session")
    assert load_bank(tmp_path / "session", bases=bases).among[0] is not None
    assert load_bank(tmp_path / "session", bases=[filled(9, 7), bases[1]], any_bases=True).among == (
        None,
        None,
    )
    assert load_bank(tmp_path / "session", any_bases=True).among == ()


def test_fingerprints_tell_content_apart():
    same = [filled(3, 1) for _ in range(2)]
    assert same[0].fingerprint() == same[1].fingerprint()
    found = {same[0].fingerprint()}
    same[0].remove([2])
    found.add(same[0].fingerprint())
    random_chunks(1, seed=3).into(same[0])
    found.add(same[0].fingerprint())
    same[1].origin = {"model": "a"}
    found.add(same[1].fingerprint())
    assert len(found) == 4


def test_a_pool_keeps_sessions_over_a_base(tmp_path):
    base = filled(20, 1)
    budget = 3 * (4 * DIM + 2 * random_chunks(1).keys.nbytes)
    pool = BankPool(
        tmp_path,
        lambda: LayeredBank(create_bank("torch", DIM), [base]),
        lambda folder: load_bank(folder, bases=[base]),
        budget=budget,
    )
    for name in "abc":
        with pool.session(name) as bank:
            random_chunks(2, seed=ord(name), first=ord(name)).into(bank)
    with pool.session("nothing") as bank:
        assert len(bank) == 20
    assert pool.in_memory == 1  # the base is not counted
    assert len(pool) == 3
    with pool.session("a") as bank:
        mine = random_chunks(2, seed=ord("a"), first=ord("a"))
        assert bank.search(mine.embeddings, 1).ids.flatten().tolist() == [TOP, TOP + 1]
        assert len(bank) == 22
    pool.close()


def test_layers_may_keep_their_chunks_in_different_places(tmp_path):
    filled(4, 1).save(tmp_path / "base")
    base = load_bank(tmp_path / "base", lazy=True)
    (tmp_path / "disk").mkdir()
    top = create_bank("torch", DIM, store=TieredStore(host="1MB", disk=tmp_path / "disk"))
    layered = LayeredBank(top, [base])
    random_chunks(3, seed=2).into(layered)
    merged = filled(4, 1)
    random_chunks(3, seed=2).into(merged)
    found, expected = layered.retrieve(random_vectors(2), 7), merged.retrieve(random_vectors(2), 7)
    assert torch.equal(found.keys, expected.keys)
    assert np.array_equal(found.scores, expected.scores)
