"""Banks that each break one clause of the contract, and the test that must find it out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from memlong.bank import InMemoryStore, MemoryBank, SearchResult, bank_of
from memlong.errors import InvalidArgumentError, SnapshotError
from memlong_torch.index import TorchIndex

TorchBank = bank_of(TorchIndex)


class SignFlipped(TorchIndex):
    """Takes a library's distance for a similarity, and names the worst."""

    def search(self, queries, k):
        return super().search(-queries, k)


class NegativeDistance(TorchBank):
    """Gives distances as scores."""

    def search(self, queries, k):
        found = super().search(queries, k)
        return SearchResult(found.scores.abs() if self.metric == "l2" else found.scores, found.ids)


class WorstFirst(TorchBank):
    """Returns hits in ascending order of score."""

    def search(self, queries, k):
        found = super().search(queries, k)
        return SearchResult(found.scores.flip(1), found.ids.flip(1))


class FewerColumns(TorchBank):
    """Returns as many columns as it has chunks."""

    def search(self, queries, k):
        found = super().search(queries, k)
        have = max(1, len(self))
        return SearchResult(found.scores[:, :have], found.ids[:, :have])


class PaddedWithZeros(TorchBank):
    """Pads with id 0 and score 0."""

    def search(self, queries, k):
        found = super().search(queries, k)
        gone = found.ids < 0
        return SearchResult(found.scores.masked_fill(gone, 0.0), found.ids.masked_fill(gone, 0))


class TiesAnyhow(TorchBank):
    """Gives equal scores with the highest id first."""

    def search(self, queries, k):
        found = super().search(queries, max(k, len(self)))
        order = [
            sorted(range(len(s)), key=lambda i: (-s[i], -d[i]))
            for s, d in zip(*map(torch.Tensor.tolist, (found.scores, found.ids)), strict=True)
        ]
        order = torch.tensor(order)[:, :k]
        return SearchResult(found.scores.gather(1, order), found.ids.gather(1, order))


class SearchesEverything(TorchBank):
    """Takes no notice of which chunks may be found."""

    def search(self, queries, k, *, among=None):
        return super().search(queries, k)


class IdsReused(TorchBank):
    """Begins with 0 again after a reset."""

    def reset(self):
        super().reset()
        self.state.contents.fill(None, 0)


class EvictedStillFound(TorchBank):
    """Goes on finding what has left."""

    def remove(self, ids):
        self._ghosts = self.embeddings
        super().remove(ids)

    def search(self, queries, k):
        found = super().search(queries, k)
        ghosts = getattr(self, "_ghosts", None)
        if ghosts is not None and len(ghosts.ids) == k:
            return SearchResult(found.scores, ghosts.ids.expand_as(found.ids).clone())
        return found


class NotThreadSafe(TorchBank):
    """Keeps the queries of a search in itself, where another thread's may take their place."""

    def retrieve(self, queries, k):
        self._queries = queries
        time.sleep(0.002)
        found = super().search(self._queries, k)
        time.sleep(0.002)
        got = super().retrieve(self._queries, k)
        return replace(got, ids=found.ids)


class LosesTheNewest(TorchBank):
    """Forgets the newest chunk when it is loaded."""

    @classmethod
    def of_stored(cls, stored, **options):
        bank = super().of_stored(stored, **options)
        bank.remove(bank.ids[-1:])
        return bank


class TrustsFiles(TorchBank):
    """Makes an empty bank of a snapshot that is damaged."""

    @classmethod
    def load(cls, path, **options):
        try:
            return super().load(path, **options)
        except SnapshotError:
            return cls(32)


class ForgetsOptions(TorchBank):
    """Does not say which options it was made with."""

    def __init__(self, dim, *, effort=1, **bank_options):
        super().__init__(dim, **bank_options)


class SavesTheDefaults(TorchBank):
    """Names its option, but not the value that the bank was made with."""

    saved_options: ClassVar = {"effort": 8}

    def __init__(self, dim, *, effort=1, **bank_options):
        super().__init__(dim, **bank_options)

    def options_to_save(self):
        return {"effort": 1}


class TakesAnyOption(TorchBank):
    """Leaves it to its library to fail on an option, or to take gigabytes for it."""

    saved_options: ClassVar = {"effort": 8}

    def __init__(self, dim, *, effort=1, **bank_options):
        super().__init__(dim, **bank_options)
        self._effort = effort

    def options_to_save(self):
        return {"effort": self._effort}


class MutatesItsInput(TorchBank):
    """Scales the caller's own embeddings."""

    def add(self, embeddings, keys, values, spans):
        if (
            isinstance(embeddings, torch.Tensor)
            and embeddings.is_floating_point()
            and not embeddings.requires_grad
        ):
            embeddings.copy_(torch.nn.functional.normalize(embeddings.float(), dim=-1))
        return super().add(embeddings, keys, values, spans)


class BorrowingStore(InMemoryStore):
    def put(self, ids, keys, values):
        self._blocks.update({each: (keys[row], values[row]) for row, each in enumerate(ids)})


class KeepsNoCopy(TorchBank):
    """Stores the caller's own tensors."""

    def __init__(self, dim, **bank_options):
        super().__init__(dim, **{"store": BorrowingStore(), **bank_options})


class LendsItsBlocks(TorchBank):
    """Returns the blocks it holds, for the caller to change."""

    def retrieve(self, queries, k):
        got = super().retrieve(queries, k)
        self._lent = getattr(self, "_lent", got)
        return self._lent


class SingleDtype(TorchBank):
    """Makes float32 of all keys and values."""

    def retrieve(self, queries, k):
        got = super().retrieve(queries, k)
        return replace(got, keys=got.keys.float(), values=got.values.float())


class SwallowsNan(TorchBank):
    """Makes zeros of what is not finite."""

    def add(self, embeddings, keys, values, spans):
        if isinstance(embeddings, torch.Tensor):
            embeddings = embeddings.nan_to_num()
        return super().add(embeddings, keys, values, spans)


class AnyArguments(TorchBank):
    """Makes do with queries that are too wide, and with no k."""

    def search(self, queries, k):
        return super().search(
            queries[..., : self.dim] if isinstance(queries, torch.Tensor) else queries, max(1, k or 1)
        )


class HalfAnAdd(TorchBank):
    """Uses up an id in an add that raised."""

    def add(self, embeddings, keys, values, spans):
        try:
            return super().add(embeddings, keys, values, spans)
        except InvalidArgumentError:
            raise
        except Exception:
            self.state.contents.fill(self.layout, self.next_id + 1)
            raise


class CountsSearches(TorchBank):
    """Counts a search as a use."""

    def search(self, queries, k):
        found = super().search(queries, k)
        rows = self.state.table.rows_of(np.unique(found.ids[found.ids >= 0].numpy()))
        self.state.table.mark_retrieved(rows[rows >= 0])
        return found


class FallsBack(TorchIndex):
    """Computes on the CPU whatever was asked for."""

    @classmethod
    def usable_device(cls, device):
        return super().usable_device(None)


class Overfull(TorchBank):
    """Takes no notice of its capacity."""

    def __init__(self, dim, *, max_chunks=None, **bank_options):
        super().__init__(dim, **bank_options)


class StopsGrowing(TorchIndex):
    """Names only the first thousand chunks, as an index does that has no room for more."""

    def search(self, queries, k):
        return np.minimum(super().search(queries, k), 999)


WRONG: dict[type[MemoryBank], str] = {
    SignFlipped: "test_recall_reaches_the_floor",
    NegativeDistance: "test_scores_are_true_similarities_in_descending_order",
    WorstFirst: "test_scores_are_true_similarities_in_descending_order",
    FewerColumns: "test_more_columns_than_chunks_are_padded",
    PaddedWithZeros: "test_more_columns_than_chunks_are_padded",
    TiesAnyhow: "test_equal_scores_come_in_ascending_id_order",
    SearchesEverything: "test_among_limits_what_is_found",
    IdsReused: "test_ids_are_never_reused",
    EvictedStillFound: "test_removed_chunks_are_never_found",
    NotThreadSafe: "test_searches_are_whole_while_another_thread_writes",
    LosesTheNewest: "test_everything_in_a_bank_is_restored",
    TrustsFiles: "test_damaged_files_are_rejected",
    ForgetsOptions: "test_the_options_are_saved",
    SavesTheDefaults: "test_other_options_come_back",
    TakesAnyOption: "test_invalid_options_are_rejected",
    MutatesItsInput: "test_any_float_array_is_accepted_unmodified",
    KeepsNoCopy: "test_later_changes_by_the_caller_do_not_reach_the_bank",
    LendsItsBlocks: "test_results_belong_to_the_caller",
    SingleDtype: "test_keys_and_values_come_back_bit_for_bit",
    SwallowsNan: "test_non_finite_values_are_rejected",
    AnyArguments: "test_wrong_arguments_of_a_search_are_named",
    HalfAnAdd: "test_an_index_that_fails_to_add_leaves_the_bank_as_it_was",
    CountsSearches: "test_retrievals_are_counted_once_a_query",
    FallsBack: "test_unusable_devices_are_rejected",
    Overfull: "test_chunks_over_capacity_are_evicted",
    StopsGrowing: "test_growth_loses_nothing",
}
