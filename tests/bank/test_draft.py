"""A draft answers like a bank that has taken its chunks in, and leaves the bank as it is."""

from __future__ import annotations

import pytest
import torch

from memlong import create_bank
from memlong.bank import Draft
from memlong.bank.finite import Finiteness
from memlong.errors import InvalidArgumentError


def chunks(count, seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 6, generator=generator)
    keys, values = (torch.randn(count, 2, 1, 3, 4, generator=generator) for _ in range(2))
    starts = torch.arange(count) * 3 + 100 * seed
    return embeddings, keys, values, torch.stack([starts, starts + 3], dim=1)


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize(("below", "own"), [(0, 3), (5, 0), (5, 4), (2, 1)])
def test_it_finds_what_a_bank_with_all_chunks_finds(metric, below, own):
    bank, whole = (create_bank("torch", 6, metric=metric) for _ in range(2))
    for each in (bank, whole):
        if below:
            each.add(*chunks(below, 1))
    draft = Draft(bank)
    if own:
        draft.add(*chunks(own, 2))
        whole.add(*chunks(own, 2))
    query = torch.randn(1, 6, generator=torch.Generator().manual_seed(9))
    named = [*range(below), *range(draft.next_id - own, draft.next_id)]  # by the id in a bank with all
    for k in (1, 3, 12):
        found, expected = draft.search(query, k), whole.search(query, k)
        assert found.ids.tolist() == [[named[each] if each >= 0 else -1 for each in expected.ids[0].tolist()]]
        assert torch.equal(found.scores, expected.scores)
    last = below + own - 1
    fetched, expected = draft.fetch([named[last], named[0], 99]), whole.fetch([last, 0, 99])
    assert fetched.ids.tolist() == [named[last], named[0]]
    for name in ("spans", "keys", "values"):
        assert torch.equal(getattr(fetched, name), getattr(expected, name)), name
    assert draft.fetch([named[0]], known=[named[last]]).ids.tolist() == [named[0]]
    assert torch.equal(draft.spans_of([named[last], 99]), whole.spans_of([last, 99]))
    assert torch.equal(draft.embeddings_of([named[last], 99, named[0]]), whole.embeddings_of([last, 99, 0]))
    assert len(draft) == len(whole)
    assert len(bank) == below


def test_forks_go_their_own_way():
    bank = create_bank("torch", 6)
    bank.add(*chunks(2, 1))
    first = Draft(bank)
    first.add(*chunks(1, 2))
    second = first.fork()
    second.add(*chunks(3, 3))
    assert (len(bank), len(first), len(second)) == (2, 3, 6)


def test_ids_of_a_draft_stay_when_the_bank_grows_and_are_never_used_again(monkeypatch):
    bank = create_bank("torch", 6)
    bank.add(*chunks(2, 1))
    draft, own = Draft(bank), chunks(1, 2)
    first = draft.next_id
    draft.add(*own)
    bank.add(*chunks(1, 3))
    assert torch.equal(draft.fetch([first]).keys, own[1])
    assert draft.fork().next_id == first + 1
    monkeypatch.setattr(Finiteness, "is_known", False)
    embeddings, keys, values, spans = chunks(1, 4)
    draft.add(embeddings, keys * float("nan"), values, spans, check_first=False)
    with pytest.raises(InvalidArgumentError, match="must be finite"):
        draft.add(*chunks(1, 5))
    draft.add(*chunks(1, 5))
    assert draft.search(chunks(1, 5)[0], 1).ids.tolist() == [[first + 2]]


def test_what_is_known_is_counted_in_the_bank_below_a_draft():
    bank = create_bank("torch", 6)
    bank.add(*chunks(3, 1))
    draft = Draft(bank)
    draft.add(*chunks(1, 2))
    draft.fetch([2], known=[0, draft.next_id - 1])
    assert bank.usage.retrievals.tolist() == [1, 0, 1]


def test_what_a_bank_refuses_a_draft_refuses():
    draft = Draft(create_bank("torch", 6))
    embeddings, keys, values, spans = chunks(2, 1)
    with pytest.raises(InvalidArgumentError, match="must be finite, got nan"):
        draft.add(torch.full_like(embeddings, float("nan")), keys, values, spans)
    with pytest.raises(InvalidArgumentError, match="embeddings"):
        draft.add(embeddings[:, :5], keys, values, spans)
    assert len(draft) == 0


def test_a_bank_fetches_by_id_and_counts_it():
    bank = create_bank("torch", 6)
    embeddings, keys, values, spans = chunks(4, 1)
    bank.add(embeddings, keys, values, spans)
    bank.remove([1])
    found = bank.fetch([3, 1, 0])
    assert found.ids.tolist() == [3, 0]
    assert torch.equal(found.keys, keys[[3, 0]])
    assert torch.equal(found.spans, spans[[3, 0]])
    assert bank.usage.retrievals.tolist() == [1, 0, 1]
    assert bank.fetch([]).ids.tolist() == []
