"""The rows of one session in a collection that many share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from memlong.bank import Floats, Ids
from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import FIELDS, Collection
from memlong_milvus.engine import Engine
from memlong_milvus.options import Consistency
from memlong_milvus.sessions import Session

MOST_ROWS = 16_384
"""What one answer of Milvus may hold."""

_BATCH_BYTES, _ANSWER_BYTES = 4 << 20, 32 << 20  # a message may have 64 MiB
_MOST_QUERIES, _MOST_HITS = 1024, 1 << 18  # of one request
_MOST_RANGES = 1024  # in which ids are asked for


class SessionRows:
    """What a bank asks of Milvus about its session.

    A row's key is the session's key and the chunk's id, and rows are only ever upserted: a write that is
    repeated changes nothing. All rows of a session are in one partition, chosen by its number, so that
    a search looks at that one only. (A partition key would do the same, but upserts of Milvus 2.3 put rows into
    partitions by another rule than that key's, where searches do not find them.)

    Parameters
    ----------
    engine : Engine
        Where.
    collection : Collection
        Which is there.
    session : Session
        Whose rows.
    consistency : "strong", "bounded" or "eventually"
        How current searches are; all else is strong.
    """

    def __init__(
        self, engine: Engine, collection: Collection, session: Session, consistency: Consistency = "strong"
    ) -> None:
        self._engine, self._collection, self._session = engine, collection, session
        self._consistency = consistency.capitalize()
        self.partition = f"p{session.partition(collection.partitions)}"
        self.filter = f"session == {session.number}"
        self._is_closed = False
        self._batch = max(1, min(MOST_ROWS, _BATCH_BYTES // (4 * collection.dim + 128)))

    @property
    def collection(self) -> Collection:
        """Where they are."""
        return self._collection

    @property
    def session(self) -> Session:
        """Whose they are."""
        return self._session

    @property
    def is_current(self) -> bool:
        """Whether a search finds all that was written before it."""
        return self._engine.address.is_local or self._consistency == "Strong"

    def close(self) -> None:
        """Refuse all that is asked from now on."""
        self._is_closed = True

    def upsert(self, ids: Ids, embeddings: Floats, spans: Ids) -> None:
        """Write rows, in place of those of the same ids."""
        for start in range(0, len(ids), self._batch):
            part = slice(start, start + self._batch)
            rows = [
                {
                    "pk": key,
                    "session": self._session.number,
                    "chunk": chunk_id,
                    "first": first,
                    "last": last,
                    "embedding": embedding,
                }
                for key, chunk_id, (first, last), embedding in zip(
                    self._session.keys_of(ids[part]),
                    ids[part].tolist(),
                    spans[part].tolist(),
                    embeddings[part],
                    strict=True,
                )
            ]
            self._call("upsert", data=rows, partition_name=self.partition)

    def search(self, queries: Floats, limit: int, effort: int) -> Ids:
        """Return ids [q, limit] of rows near to queries, -1 where there are fewer."""
        ids = np.full((len(queries), limit), -1, dtype=np.int64)
        together = max(1, min(_MOST_QUERIES, _MOST_HITS // limit))
        for start in range(0, len(queries), together):
            part = slice(start, start + together)
            found = self._call(
                "search",
                data=list(queries[part]),
                anns_field="embedding",
                filter=self.filter,
                limit=limit,
                output_fields=["pk"],
                search_params={"metric_type": self._collection.metric, "params": {"ef": max(effort, limit)}},
                consistency_level=self._consistency,
                partition_names=[self.partition],
            )
            for row, hits in zip(ids[part], found, strict=True):
                ours = self._session.ids_of(hits.ids)
                row[: len(ours)] = ours
        return ids

    def delete(self, ids: Ids) -> None:
        """Remove rows; those that are not there count as removed."""
        for start in range(0, len(ids), MOST_ROWS // 4):
            keys = self._session.keys_of(ids[start : start + MOST_ROWS // 4])
            self._call("delete", ids=keys, partition_name=self.partition)

    def held(self, next_id: int) -> Ids:
        """Return the ids of all rows there are now, ascending; few are of ``next_id`` or above."""
        rows = self._query(f"chunk >= {next_id}", ["pk"], MOST_ROWS)
        step = max(MOST_ROWS - 1, next_id // _MOST_RANGES)  # ids may be few and far between
        for low in range(0, next_id, step):
            rows += self._between(low, min(low + step, next_id), ["pk"], MOST_ROWS)
        return np.array(sorted(self._session.ids_of([row["pk"] for row in rows])), dtype=np.int64)

    def among(self, ids: Ids) -> Ids:
        """Return those of some ids, ascending and distinct, that have a row now; it takes as long as they are many."""
        found = [row["chunk"] for rows in self._of(ids, ["pk", "chunk"], MOST_ROWS) for row in rows]
        return np.array(found, dtype=np.int64)

    def is_empty(self) -> bool:
        """Whether there are no rows now."""
        return not self._session.ids_of([row["pk"] for row in self._query("chunk >= 0", ["pk"], MOST_ROWS)])

    def read(self, ids: Ids) -> tuple[Ids, Floats, Ids]:
        """Return ids [n], embeddings [n, dim] and spans [n, 2] of the rows there are now of ids, which ascend."""
        most = max(2, min(MOST_ROWS, _ANSWER_BYTES // (4 * self._collection.dim + 128)))
        numbers = np.empty((0, 3), dtype=np.int64)
        embeddings = np.empty((0, self._collection.dim), dtype=np.float32)
        parts = [(numbers, embeddings)]
        for rows in self._of(ids, list(FIELDS), most):
            found = [[row[name] for name in ("chunk", "first", "last")] for row in rows]
            vectors = [row["embedding"] for row in rows]
            parts.append((np.array(found, numbers.dtype), np.array(vectors, embeddings.dtype)))
        numbers = np.concatenate([each for each, _ in parts if len(each)] or [numbers])
        embeddings = np.concatenate([each for _, each in parts if len(each)] or [embeddings])
        return numbers[:, 0].copy(), embeddings, numbers[:, 1:].copy()

    def _of(self, ids: Ids, fields: list[str], most: int) -> Iterator[list[dict[str, Any]]]:
        """Give the rows of some ids, ascending as these are, fewer than ``most`` at a time."""
        start, wanted = 0, set(ids.tolist())
        while start < len(ids):
            end = int(np.searchsorted(ids, ids[start] + most - 1))
            rows = self._between(int(ids[start]), int(ids[end - 1]) + 1, fields, most)
            ours = {row["chunk"]: row for row in rows if self._session.ids_of([row["pk"]])}
            yield [ours[chunk_id] for chunk_id in sorted(wanted.intersection(ours))]
            start = end

    def _between(self, low: int, high: int, fields: list[str], most: int) -> list[dict[str, Any]]:
        """Return the rows of ids from low to below high, fewer than `most` ids."""
        rows = self._query(f"chunk >= {low} and chunk < {high}", fields, most)
        if len(rows) < most or high - low == 1:
            return rows
        middle = (low + high) // 2  # another session has the same number, and there may be more
        return self._between(low, middle, fields, most) + self._between(middle, high, fields, most)

    def _query(self, condition: str, fields: list[str], limit: int) -> list[dict[str, Any]]:
        return list(
            self._call(
                "query",
                filter=f"{self.filter} and {condition}",
                output_fields=fields,
                limit=limit,
                consistency_level="Strong",
                partition_names=[self.partition],
            )
        )

    def _call(self, method: str, **options: Any) -> Any:
        if self._is_closed:
            raise InvalidArgumentError(
                f"the bank of the session {self._session.name!r} is closed; another one can continue a session that "
                "has a name: MilvusBank.reopen"
            )
        return self._engine.call(method, self._collection.name, **options)
