"""The rows of one session in a collection that many share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from memlong.bank import Floats, Ids
from memlong.errors import InvalidArgumentError
from memlong_milvus.collection import FIELDS, Collection
from memlong_milvus.connection import Engine
from memlong_milvus.options import Consistency
from memlong_milvus.sessions import Session

MOST_ROWS = 16_384
"""The most rows in one answer of Milvus."""

_ABOVE_IDS = (1 << 63) - 1
_BATCH_BYTES, _ANSWER_BYTES = 4 << 20, 32 << 20  # a message may have 64 MiB
_MOST_QUERIES, _MOST_HITS = 1024, 1 << 18  # of one request
_NO_IDS: Ids = np.empty(0, dtype=np.int64)


class SessionRows:
    """What a bank asks of Milvus about its session.

    A row's key is the session's key and the chunk's id, and rows are only ever upserted, so a write that is repeated
    changes nothing. All rows of a session are in one partition, chosen by its number, and a search looks at that one
    only. (A partition key would do the same, but Milvus 2.3 upserts rows into other partitions than it searches.)

    ``consistency`` is that of searches; all else is strong.
    """

    why_closed = ""
    """Why it refuses calls; empty while it does not."""

    def __init__(
        self, engine: Engine, collection: Collection, session: Session, consistency: Consistency = "strong"
    ) -> None:
        self._engine, self.collection, self.session = engine, collection, session
        self._consistency = consistency.capitalize()
        self.partition = f"p{session.partition(collection.partitions)}"
        self.filter = f"session == {session.number}"
        self._row_bytes = 4 * collection.dim + 128

    @property
    def is_current(self) -> bool:
        """Whether a search finds all that was written before it."""
        return self._engine.address.is_local or self._consistency == "Strong"

    def upsert(self, ids: Ids, embeddings: Floats, spans: Ids) -> None:
        """Write rows, in place of those of the same ids."""
        size = max(1, min(MOST_ROWS, _BATCH_BYTES // self._row_bytes))
        numbers = np.column_stack([np.full(len(ids), self.session.number), ids, spans])
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            columns = zip(
                self.session.keys_of(ids[part]), numbers[part].tolist(), embeddings[part], strict=True
            )
            rows = [dict(zip(FIELDS, (key, *each, vector), strict=True)) for key, each, vector in columns]
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
                search_params={"metric_type": self.collection.metric, "params": {"ef": max(effort, limit)}},
                consistency_level=self._consistency,
                partition_names=[self.partition],
            )
            for row, hits in zip(ids[part], found, strict=True):
                ours = self.session.ids_of(hits.ids)
                row[: len(ours)] = ours
        return ids

    def delete(self, ids: Ids) -> None:
        """Remove rows; those that are not there count as removed."""
        for start in range(0, len(ids), MOST_ROWS // 4):
            keys = self.session.keys_of(ids[start : start + MOST_ROWS // 4])
            self._call("delete", ids=keys, partition_name=self.partition)

    def held(self, expected: Ids = _NO_IDS) -> Ids:
        """Return the ids of all rows there are now, ascending; sooner if most are among ``expected``, which ascend."""
        found = [row["chunk"] for rows in self._scan(expected, ["pk", "chunk"], MOST_ROWS) for row in rows]
        return np.array(found, dtype=np.int64)

    def read(self, ids: Ids) -> tuple[Ids, Floats, Ids]:
        """Return ids [n], embeddings [n, dim] and spans [n, 2] of the rows there are now of ids, which ascend."""
        numbers = [np.empty((0, 3), dtype=np.int64)]
        vectors = [np.empty((0, self.collection.dim), dtype=np.float32)]
        wanted = set(ids.tolist())
        for rows in self._scan(ids, list(FIELDS), max(2, min(MOST_ROWS, _ANSWER_BYTES // self._row_bytes))):
            ours = [row for row in rows if row["chunk"] in wanted]
            if ours:
                numbers.append(np.array([[row["chunk"], row["first"], row["last"]] for row in ours]))
                vectors.append(np.array([row["embedding"] for row in ours], dtype=np.float32))
        found = np.concatenate(numbers)
        return found[:, 0].copy(), np.concatenate(vectors), found[:, 1:].copy()

    def _scan(self, expected: Ids, fields: list[str], most: int) -> Iterator[list[dict[str, Any]]]:
        """Give all rows of the session, ascending by id, in ranges that hold fewer than ``most`` expected ids."""
        edges = [0, *expected[most - 1 :: most - 1].tolist(), _ABOVE_IDS]
        for low, high in pairwise(edges):
            rows = self._between(low, high, fields, most)
            ours = [row for row in rows if self.session.ids_of([row["pk"]])]
            yield sorted(ours, key=lambda row: int(row["chunk"]))

    def _between(self, low: int, high: int, fields: list[str], most: int) -> list[dict[str, Any]]:
        """Return the rows of ids from low to below high, other sessions' of the same number among them."""
        rows = list(
            self._call(
                "query",
                filter=f"{self.filter} and chunk >= {low} and chunk < {high}",
                output_fields=fields,
                limit=most,
                consistency_level="Strong",
                partition_names=[self.partition],
            )
        )
        if len(rows) < most or high - low == 1:
            return rows
        middle = (low + high) // 2
        return self._between(low, middle, fields, most) + self._between(middle, high, fields, most)

    def _call(self, method: str, **options: Any) -> Any:
        if self.why_closed:
            raise InvalidArgumentError(self.why_closed)
        return self._engine.call(method, self.collection.name, **options)
