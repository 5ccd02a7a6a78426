"""Banks whose index breaks a clause that the base would hide, and the test that must find it out."""

from __future__ import annotations

import time

import numpy as np

from memlong.bank import MemoryBank
from memlong_hnswlib.bank import HnswlibBank


class RightIndex(MemoryBank):
    """What the wrong ones derive from: ids and embeddings, searched by brute force."""

    def __init__(self, dim, **bank_options):
        super().__init__(dim, **bank_options)
        self._index_reset()

    def _index_reset(self):
        self._ids = np.empty(0, dtype=np.int64)
        self._vectors = np.empty((0, self.dim), dtype=np.float32)

    def _index_add(self, ids, embeddings):
        self._ids = np.concatenate([self._ids, ids])
        self._vectors = np.concatenate([self._vectors, embeddings])

    def _index_search(self, queries, k):
        scores = queries @ self._vectors.T
        if self._similarity == "l2":
            scores = 2 * scores - np.square(self._vectors).sum(axis=1)
        return self._ids[np.argsort(-scores, axis=1)[:, :k]]

    def _index_remove(self, ids):
        staying = ~np.isin(self._ids, ids)
        self._ids, self._vectors = self._ids[staying], self._vectors[staying]


class NamesNothing(RightIndex):
    """Leaves all the work to the base."""

    def _index_search(self, queries, k):
        return np.full((len(queries), k), -1, dtype=np.int64)


class AnswersOneQuery(RightIndex):
    """Names candidates for the first query of a batch alone."""

    def _index_search(self, queries, k):
        found = super()._index_search(queries, k)
        found[1:] = -1
        return found


class UnsignedIds(RightIndex):
    """Passes on the ids of a library as they come."""

    def _index_search(self, queries, k):
        return super()._index_search(queries, k).astype(np.uint64)


class NeverForgets(RightIndex):
    """Keeps what has left, which takes ever more places of what is held."""

    def _index_remove(self, ids):
        pass


class KeepsWhatHasLeft(RightIndex):
    """Passes over what has left, and keeps it for good."""

    def _index_reset(self):
        super()._index_reset()
        self._gone = np.empty(0, dtype=np.int64)

    def _index_search(self, queries, k):
        everything = super()._index_search(queries, len(self._ids))
        return np.stack([row[~np.isin(row, self._gone)][:k] for row in everything])

    def _index_remove(self, ids):
        self._gone = np.concatenate([self._gone, ids])


class NeverRebuilds(HnswlibBank):
    """Leaves a library that marks what has left with ever more of it; Python sees that only in what is saved."""

    def _index_remove(self, ids):
        for each in ids.tolist():
            self._graph.mark_deleted(each)
        self._dead += len(ids)


class KeepsTheArrays(RightIndex):
    """Keeps the very arrays of the first add, which the base will write over."""

    def _index_add(self, ids, embeddings):
        if len(self._ids):
            super()._index_add(ids, embeddings)
        else:
            self._ids, self._vectors = ids, embeddings


class NormalisesInPlace(RightIndex):
    """Changes the embeddings that it is given, which are the bank's own."""

    def _index_add(self, ids, embeddings):
        embeddings /= 2
        super()._index_add(ids, embeddings)


class SharesItsScratch(RightIndex):
    """Keeps the queries of a search in itself, where another thread's may take their place."""

    def _index_search(self, queries, k):
        self._queries = queries
        time.sleep(0.0005)
        return super()._index_search(self._queries, k)


class SavesTooLittle(RightIndex):
    """Saves the index without what was added last."""

    def _index_add(self, ids, embeddings):
        self._newest = ids[0]
        super()._index_add(ids, embeddings)

    def _index_save(self):
        old = self._ids < self._newest
        return {"rows": int(old.sum())}, self._ids[old].tobytes() + self._vectors[old].tobytes()

    def _index_load(self, facts, content):
        rows = facts["rows"]
        self._ids = np.frombuffer(content, dtype=np.int64, count=rows)
        self._vectors = np.frombuffer(content, dtype=np.float32, offset=8 * rows).reshape(rows, self.dim)


WRONG: dict[type[MemoryBank], str] = {
    NamesNothing: "test_the_index_itself_finds_the_best",
    AnswersOneQuery: "test_the_index_itself_finds_the_best",
    UnsignedIds: "test_candidates_are_int64_rows_of_ids",
    NeverForgets: "test_what_has_left_takes_no_places",
    KeepsWhatHasLeft: "test_what_has_left_takes_no_memory",
    NeverRebuilds: "test_what_has_left_takes_no_memory",
    KeepsTheArrays: "test_arrays_are_lent_for_the_call_alone",
    NormalisesInPlace: "test_arrays_are_lent_for_the_call_alone",
    SharesItsScratch: "test_searches_side_by_side_find_what_they_find_alone",
    SavesTooLittle: "test_a_saved_index_holds_every_batch",
}
