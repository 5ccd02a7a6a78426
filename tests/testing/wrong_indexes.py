"""Indexes that break a clause that the bank would hide, and the test that must find it out."""

from __future__ import annotations

import time

import numpy as np

from memlong.bank import Index
from memlong_hnswlib.index import HnswlibIndex


class RightIndex(Index):
    """What the wrong ones derive from: ids and embeddings, searched by brute force."""

    def reset(self):
        self._ids = np.empty(0, dtype=np.int64)
        self._vectors = np.empty((0, self.rows.dim), dtype=np.float32)

    def add(self, ids, embeddings):
        self._ids = np.concatenate([self._ids, ids])
        self._vectors = np.concatenate([self._vectors, embeddings])

    def search(self, queries, k):
        scores = queries @ self._vectors.T
        if self.rows.similarity == "l2":
            scores = 2 * scores - np.square(self._vectors).sum(axis=1)
        return self._ids[np.argsort(-scores, axis=1)[:, :k]]

    def remove(self, ids):
        staying = ~np.isin(self._ids, ids)
        self._ids, self._vectors = self._ids[staying], self._vectors[staying]
        return True


class NamesNothing(RightIndex):
    """Leaves all the work to the base."""

    def search(self, queries, k):
        return np.full((len(queries), k), -1, dtype=np.int64)


class AnswersOneQuery(RightIndex):
    """Names candidates for the first query of a batch alone."""

    def search(self, queries, k):
        found = super().search(queries, k)
        found[1:] = -1
        return found


class UnsignedIds(RightIndex):
    """Passes on the ids of a library as they come."""

    def search(self, queries, k):
        return super().search(queries, k).astype(np.uint64)


class NeverForgets(RightIndex):
    """Keeps what has left, which takes ever more places of what is held."""

    def remove(self, ids):
        pass


class KeepsWhatHasLeft(RightIndex):
    """Passes over what has left, and keeps it for good."""

    def reset(self):
        super().reset()
        self._gone = np.empty(0, dtype=np.int64)

    def search(self, queries, k):
        everything = super().search(queries, len(self._ids))
        return np.stack([row[~np.isin(row, self._gone)][:k] for row in everything])

    def remove(self, ids):
        self._gone = np.concatenate([self._gone, ids])


class NeverRebuilds(HnswlibIndex):
    """Leaves a library that marks what has left with ever more of it; Python sees that only in what is saved."""

    def remove(self, ids):
        for each in ids.tolist():
            self._graph.mark_deleted(each)
        self._dead += len(ids)


class KeepsTheArrays(RightIndex):
    """Keeps the very arrays of the first add, which the base will write over."""

    def add(self, ids, embeddings):
        if len(self._ids):
            super().add(ids, embeddings)
        else:
            self._ids, self._vectors = ids, embeddings


class NormalisesInPlace(RightIndex):
    """Changes the embeddings that it is given, which are the bank's own."""

    def add(self, ids, embeddings):
        embeddings /= 2
        super().add(ids, embeddings)


class SharesItsScratch(RightIndex):
    """Keeps the queries of a search in itself, where another thread's may take their place."""

    def search(self, queries, k):
        self._queries = queries
        time.sleep(0.0005)
        return super().search(self._queries, k)


class SavesTooLittle(RightIndex):
    """Saves the index without what was added last."""

    def add(self, ids, embeddings):
        self._newest = ids[0]
        super().add(ids, embeddings)

    def dump(self):
        old = self._ids < self._newest
        return {"rows": int(old.sum())}, self._ids[old].tobytes() + self._vectors[old].tobytes()

    def load(self, facts, content):
        rows = facts["rows"]
        self._ids = np.frombuffer(content, dtype=np.int64, count=rows)
        self._vectors = np.frombuffer(content, dtype=np.float32, offset=8 * rows).reshape(rows, self.rows.dim)


WRONG: dict[type[Index], str] = {
    NamesNothing: "test_the_index_itself_finds_the_best",
    AnswersOneQuery: "test_the_index_itself_finds_the_best",
    UnsignedIds: "test_candidates_are_int64_rows_of_ids",
    NeverForgets: "test_removed_chunks_displace_no_candidates",
    KeepsWhatHasLeft: "test_removed_chunks_take_no_memory",
    NeverRebuilds: "test_removed_chunks_take_no_memory",
    KeepsTheArrays: "test_arrays_are_only_valid_during_the_call",
    NormalisesInPlace: "test_arrays_are_only_valid_during_the_call",
    SharesItsScratch: "test_concurrent_searches_find_what_they_find_alone",
    SavesTooLittle: "test_a_saved_index_holds_every_batch",
}
