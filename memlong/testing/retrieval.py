"""The contract of retrieving K-V and counting retrievals."""

from __future__ import annotations

import pytest
import torch

from memlong.testing.harness import BLOCK, BankSuite, random_chunks, random_vectors, whatever_the_options


class RetrievalTests(BankSuite):
    """The results and counts of `retrieve`."""

    @whatever_the_options
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_keys_and_values_come_back_bit_for_bit(self, dtype: torch.dtype) -> None:
        """Every hit has the exact K-V and span that it was added with, in their dtype."""
        bank, chunks = self.make(), random_chunks(40)
        keys = torch.randn(40, *BLOCK, generator=torch.Generator().manual_seed(3)).to(dtype)
        values = keys.flip(0) * 3
        bank.add(chunks.embeddings, keys, values, chunks.spans)
        got = bank.retrieve(random_vectors(3, seed=1), 5)
        assert got.keys.shape == got.values.shape == (3, 5, *BLOCK)
        assert got.keys.dtype == got.values.dtype == dtype
        assert torch.equal(got.keys, keys[got.ids])
        assert torch.equal(got.values, values[got.ids])
        assert torch.equal(got.spans, chunks.spans[got.ids])

    def test_retrieve_finds_what_search_finds(self) -> None:
        """Ids and scores equal those of `search`."""
        bank, _ = self.filled(100)
        queries = random_vectors(4, seed=1)
        got, found = bank.retrieve(queries, 6), bank.search(queries, 6)
        assert torch.equal(got.ids, found.ids)
        assert torch.equal(got.scores, found.scores)
        assert got.found.all()

    def test_embeddings_by_id_are_those_that_are_searched(self) -> None:
        """Each id gets its own embedding; one that the bank does not hold gets zeros."""
        bank, _ = self.filled(9)
        bank.remove([2])
        held = bank.embeddings
        got = bank.embeddings_of([7, 2, 0, 99, 7])
        assert torch.equal(
            got[[0, 2, 4]], held.embeddings[torch.searchsorted(held.ids, torch.tensor([7, 0, 7]))]
        )
        assert (got[[1, 3]] == 0).all()

    def test_missing_chunks_are_zeros(self) -> None:
        """A missing hit has zero K-V and span -1."""
        bank = self.make()
        random_chunks(2, first=5).into(bank)
        got = bank.retrieve(random_vectors(3, seed=1), 4)
        assert got.found.tolist() == [[True, True, False, False]] * 3
        assert (got.keys[:, 2:] == 0).all()
        assert (got.values[:, 2:] == 0).all()
        assert (got.spans[:, 2:] == -1).all()
        assert (got.keys[:, :2] != 0).all()

    def test_empty_bank_retrieves_nothing(self) -> None:
        """A bank with no known chunk shape returns K-V of shape [q, k, 0, 0, 0, 0]."""
        got = self.make().retrieve(random_vectors(2), 3)
        assert got.keys.shape == got.values.shape == (2, 3, 0, 0, 0, 0)
        assert got.spans.shape == (2, 3, 2)
        assert not got.found.any()

    def test_emptied_bank_keeps_the_chunk_shape(self) -> None:
        """After all chunks are removed, K-V is zeros of their shape."""
        bank, _ = self.filled(3)
        bank.remove(bank.ids)
        assert bank.retrieve(random_vectors(2), 3).keys.shape == (2, 3, *BLOCK)

    def test_retrievals_are_counted_once_a_query(self) -> None:
        """Each returned id counts once per query and is marked as used; `search` does not count."""
        bank, chunks = self.filled(8)
        bank.search(chunks.embeddings, 8)
        assert bank.usage.retrievals.tolist() == [0] * 8
        added = bank.usage.last_used.copy()
        twice = chunks.embeddings[[2, 2, 5]]
        bank.retrieve(twice, 1)
        assert bank.usage.retrievals.tolist() == [0, 0, 2, 0, 0, 1, 0, 0]
        assert (bank.usage.last_used > added).tolist() == [i in (2, 5) for i in range(8)]

    @whatever_the_options
    def test_results_belong_to_the_caller(self) -> None:
        """Modifying a result does not change the bank."""
        bank, chunks = self.filled(4)
        first = bank.retrieve(chunks.embeddings, 2)
        for tensor in (first.keys, first.values, first.spans, first.scores, first.ids):
            tensor.fill_(77)
        bank.ids.fill_(77)
        bank.embeddings.embeddings.fill_(77)
        again = bank.retrieve(chunks.embeddings, 2)
        assert again.ids[:, 0].tolist() == [0, 1, 2, 3]
        assert torch.equal(again.keys, chunks.keys[again.ids])
        assert torch.equal(again.values, chunks.values[again.ids])
        assert torch.equal(again.spans, chunks.spans[again.ids])
