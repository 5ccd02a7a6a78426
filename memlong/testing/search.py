"""The contract of searching."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from memlong.testing.harness import DIM, METRICS, BankSuite, assert_found, random_chunks, random_vectors


def similarity(metric: str, queries: torch.Tensor, vectors: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return float64 [q, n] similarities by the textbook definition."""
    wide, others = queries.double(), vectors.double()
    if metric == "l2":
        return -(wide[:, None] - others[None]).square().sum(-1).numpy()
    if metric == "cosine":
        wide, others = torch.nn.functional.normalize(wide), torch.nn.functional.normalize(others)
    return (wide @ others.T).numpy()


class SearchTests(BankSuite):
    """The results of `search`."""

    @pytest.mark.parametrize("k", [1, 7, 20])
    def test_result_has_k_columns_of_fixed_types(self, k: int) -> None:
        """Scores are float32 and ids int64, on the CPU, with one row per query and k columns."""
        bank, _ = self.filled(20)
        found = bank.search(random_vectors(4, seed=1), k)
        assert found.scores.shape == found.ids.shape == (4, k)
        assert (found.scores.dtype, found.ids.dtype) == (torch.float32, torch.int64)
        assert found.scores.device.type == found.ids.device.type == "cpu"

    def test_more_columns_than_chunks_are_padded(self) -> None:
        """Every chunk is returned, followed by missing hits with id -1 and score -inf."""
        bank, _ = self.filled(5)
        found = bank.search(random_vectors(3, seed=1), 9)
        assert found.scores.shape == found.ids.shape == (3, 9)
        assert (found.ids[:, :5].sort(dim=1).values == torch.arange(5)).all()
        assert (found.ids[:, 5:] == -1).all()
        assert (found.scores[:, 5:] == -torch.inf).all()
        assert found.scores[:, :5].isfinite().all()

    def test_empty_bank_finds_nothing(self) -> None:
        """Searching an empty bank is not an error."""
        found = self.make().search(random_vectors(2), 3)
        assert found.ids.tolist() == [[-1] * 3] * 2
        assert (found.scores == -torch.inf).all()

    def test_no_queries_give_no_rows(self) -> None:
        """Zero queries give [0, k]."""
        bank, _ = self.filled(5)
        assert bank.search(torch.empty(0, DIM), 3).ids.shape == (0, 3)

    @pytest.mark.parametrize("metric", METRICS)
    def test_scores_are_true_similarities_in_descending_order(self, metric: str) -> None:
        """Scores follow the metric, higher is better, best first; L2 is the negative squared distance."""
        bank, chunks = self.filled(200, metric=metric)
        queries = random_vectors(6, seed=1)
        found = bank.search(queries, 10)
        true = similarity(metric, queries, chunks.embeddings)
        expected = np.take_along_axis(true, found.ids.numpy(), axis=1)
        np.testing.assert_allclose(found.scores.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()
        assert all(len(set(row)) == 10 for row in found.ids.tolist())

    @pytest.mark.parametrize("metric", METRICS)
    def test_a_stored_vector_finds_itself(self, metric: str) -> None:
        """Among orthogonal vectors, each finds itself first."""
        bank = self.make(metric=metric)
        chunks = random_chunks(DIM)
        bank.add(torch.eye(DIM), chunks.keys, chunks.values, chunks.spans)
        assert bank.search(torch.eye(DIM), 1).ids[:, 0].tolist() == list(range(DIM))

    @pytest.mark.parametrize("metric", METRICS)
    def test_recall_reaches_the_floor(self, metric: str) -> None:
        """Searches find at least `recall_floor` of the true best ten, counted by score."""
        bank, _ = self.filled(600, metric=metric)
        queries = random_vectors(50, seed=1)
        true = bank.exact_search(queries, 10)
        found = bank.search(queries, 10)
        recall = (found.scores >= true.scores[:, -1:]).float().mean().item()
        assert_found(recall, self.recall_floor, "a search finds")
        if self.exact:
            assert torch.equal(found.ids, true.ids)
            assert torch.equal(found.scores, true.scores)

    def test_equal_scores_come_in_ascending_id_order(self) -> None:
        """Chunks with the same embedding are returned lowest id first."""
        bank, chunks = self.filled(6)
        for first in (6, 12):
            again = random_chunks(6, first=first)
            again.into(bank)
        found = bank.search(chunks.embeddings, 3)
        assert found.ids.tolist() == [[i, i + 6, i + 12] for i in range(6)]
        assert (found.scores == found.scores[:, :1]).all()

    def test_ties_at_the_cut_keep_the_lowest_ids(self) -> None:
        """If more chunks tie for the last place than fit, an exact bank keeps the lowest ids."""
        if not self.exact:
            pytest.skip("an approximate bank only orders what it returns")
        bank, chunks = self.make(), random_chunks(300)
        bank.add(random_vectors(1).repeat(300, 1), chunks.keys, chunks.values, chunks.spans)
        assert bank.search(random_vectors(2), 7).ids.tolist() == [list(range(7))] * 2

    def test_results_do_not_depend_on_the_batch(self) -> None:
        """A query gets the same results in a batch as alone, up to the last bits of scores."""
        bank, _ = self.filled(300)
        queries = random_vectors(33, seed=1)
        together = bank.search(queries, 8)
        alone = torch.cat([bank.search(query[None], 8).scores for query in queries])
        agreeing = torch.isclose(together.scores, alone, rtol=1e-5, atol=1e-6).float().mean().item()
        assert agreeing == 1.0 if self.exact else agreeing >= self.recall_floor

    def test_zero_vectors_score_zero_under_cosine(self) -> None:
        """A zero vector has similarity 0 to everything, as if orthogonal."""
        bank, chunks = self.make(metric="cosine"), random_chunks(2)
        bank.add(torch.stack([torch.zeros(DIM), torch.ones(DIM)]), chunks.keys, chunks.values, chunks.spans)
        assert bank.search(torch.zeros(1, DIM), 2).scores.tolist() == [[0.0, 0.0]]
        ones = bank.search(torch.ones(1, DIM), 2)
        assert ones.ids.tolist() == [[1, 0]]
        assert ones.scores[0].tolist() == pytest.approx([1.0, 0.0])

    def test_exact_search_is_brute_force(self) -> None:
        """`exact_search` returns the true best, whatever the index does."""
        bank, chunks = self.filled(200)
        queries = random_vectors(5, seed=1)
        true = similarity("cosine", queries, chunks.embeddings)
        assert bank.exact_search(queries, 6).ids.tolist() == np.argsort(-true, axis=1)[:, :6].tolist()

    def test_among_limits_what_is_found(self) -> None:
        """With `among`, only these chunks are found, and counted: the best of them, whatever else the bank holds."""
        bank, chunks = self.filled(600)
        queries = random_vectors(50, seed=1)
        best = bank.exact_search(queries, 1).ids
        others = bank.ids[~torch.isin(bank.ids, best)].flip(0)
        true, found = (method(queries, 1, among=others) for method in (bank.exact_search, bank.search))
        assert torch.isin(found.ids, others).all()
        recall = (found.scores >= true.scores).float().mean().item()
        assert_found(recall, self.recall_floor, "among all but the best of each query, a search finds")
        if self.exact:
            assert torch.equal(found.ids, true.ids)
            assert torch.equal(found.scores, true.scores)
        few = bank.retrieve(chunks.embeddings[[3, 7]], 3, among=[7, 3, 3, 10_000])
        assert few.ids.tolist() == [[3, 7, -1], [7, 3, -1]]
        assert few.scores.isneginf().tolist() == [[False, False, True]] * 2
        assert np.flatnonzero(bank.usage.retrievals).tolist() == [3, 7]
        assert bank.usage.retrievals[[3, 7]].tolist() == [2, 2]
        assert bank.search(queries, 2, among=[]).ids.unique().tolist() == [-1]
