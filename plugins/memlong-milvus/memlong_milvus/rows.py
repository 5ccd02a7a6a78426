"""The rows of one session in a collection that many share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pymilvus import DataType, MilvusClient

from memlong.bank import Floats, Ids
from memlong.errors import InvalidArgumentError
from memlong_milvus.engine import Engine
from memlong_milvus.sessions import Session

Consistency = Literal["strong", "bounded", "eventually"]

MOST_ROWS = 16_384
"""What one answer of Milvus may hold."""

_METRICS = {"inner_product": "IP", "l2": "L2"}
_BATCH_BYTES, _ANSWER_BYTES = 4 << 20, 32 << 20  # a message may have 64 MiB
_FIELDS = ("pk", "session", "chunk", "first", "last", "embedding")
_MOST_QUERIES, _MOST_HITS = 1024, 1 << 18  # of one request
_KEY_LENGTH = 64
_ELSE = "Name another as collection, or leave it out: then each dim and metric has one of its own"


@dataclass(frozen=True)
class CollectionPlan:
    """What a collection must be like, or is made like.

    Attributes
    ----------
    name : str
        Of the collection.
    dim : int
        Width of the embeddings.
    similarity : "inner_product" or "l2"
        What Milvus ranks by.
    partitions : int
        How many to make; a collection that is there keeps those it has.
    links, effort : int
        M and efConstruction of the HNSW graph, for one that is made.
    """

    name: str
    dim: int
    similarity: str
    partitions: int
    links: int
    effort: int

    @property
    def metric(self) -> str:
        """The similarity, as Milvus calls it."""
        return _METRICS[self.similarity]


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows as they were written: ids ascending, with embeddings and spans."""

    ids: Ids
    embeddings: Floats
    spans: Ids


class SessionRows:
    """What a bank asks of Milvus about its session.

    A row's key is the session's 128-bit key and the chunk's id, and rows are only ever upserted: a write that is
    done twice comes to the same as once. All rows of a session are in one partition, chosen by its number, so that
    a search looks at that one only. (A partition key would do the same, but upserts of Milvus 2.3 put rows into
    partitions by another rule than that key's, where searches do not find them.)

    Parameters
    ----------
    engine : Engine
        Where.
    plan : CollectionPlan
        The collection, which is made if it is not there.
    session : Session
        Whose rows.
    consistency : "strong", "bounded" or "eventually"
        How current searches are.

    Raises
    ------
    InvalidArgumentError
        If the collection is there, and for other embeddings.
    BackendError
        If Milvus does not answer.
    """

    def __init__(
        self, engine: Engine, plan: CollectionPlan, session: Session, consistency: Consistency
    ) -> None:
        self._engine, self._plan, self._session = engine, plan, session
        self._consistency = consistency.capitalize()
        with engine.setting_up:
            partitions = _ready_collection(engine, plan)
        self._partition = f"p{session.partition(partitions)}"
        self._filter = f"session == {session.number}"
        self._batch = max(1, min(MOST_ROWS, _BATCH_BYTES // (4 * plan.dim + 128)))

    @property
    def collection(self) -> str:
        """Its name."""
        return self._plan.name

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
            self._call("upsert", data=rows, partition_name=self._partition)

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
                filter=self._filter,
                limit=limit,
                output_fields=["pk"],
                search_params={"metric_type": self._plan.metric, "params": {"ef": max(effort, limit)}},
                consistency_level=self._consistency,
                partition_names=[self._partition],
            )
            for row, hits in zip(ids[part], found, strict=True):
                ours = self._session.ids_of(hits.ids)
                row[: len(ours)] = ours
        return ids

    def delete(self, ids: Ids) -> None:
        """Remove rows; those that are not there count as removed."""
        for start in range(0, len(ids), MOST_ROWS // 4):
            keys = self._session.keys_of(ids[start : start + MOST_ROWS // 4])
            self._call("delete", ids=keys, partition_name=self._partition)

    def held(self, next_id: int) -> Ids:
        """Return the ids of all rows there are now, ascending; few are of ``next_id`` or above."""
        bounds = [*range(0, next_id, MOST_ROWS), next_id]
        conditions = [f"chunk >= {low} and chunk < {high}" for low, high in pairwise(bounds)]
        parts = [self._ids(f"{self._filter} and {each}") for each in (*conditions, f"chunk >= {next_id}")]
        return np.sort(np.concatenate(parts))

    def some_ids(self) -> Ids:
        """Return the ids of rows there are now, as many as one answer may hold."""
        return self._ids(self._filter)

    def _ids(self, condition: str) -> Ids:
        found = self._query(condition, ["pk"], MOST_ROWS)
        return np.array(sorted(self._session.ids_of([row["pk"] for row in found])), dtype=np.int64)

    def read(self, ids: Ids) -> Iterator[StoredRows]:
        """Give the rows there are now of ids, which ascend, in batches."""
        start, most = 0, max(1, min(MOST_ROWS, _ANSWER_BYTES // (4 * self._plan.dim + 128)))
        while start < len(ids):
            end = int(np.searchsorted(ids, ids[start] + most))
            condition = f"{self._filter} and chunk >= {ids[start]} and chunk <= {ids[end - 1]}"
            yield self._rows(condition, ids[start:end], most)
            start = end

    def _rows(self, condition: str, ids: Ids, most: int) -> StoredRows:
        wanted = set(ids.tolist())
        found = {
            row["chunk"]: row
            for row in self._query(condition, list(_FIELDS), most)
            if row["chunk"] in wanted and self._session.ids_of([row["pk"]])
        }
        rows = [found[chunk_id] for chunk_id in sorted(found)]
        return StoredRows(
            np.array([row["chunk"] for row in rows], dtype=np.int64),
            np.array([row["embedding"] for row in rows], dtype=np.float32).reshape(-1, self._plan.dim),
            np.array([[row["first"], row["last"]] for row in rows], dtype=np.int64).reshape(-1, 2),
        )

    def _query(self, condition: str, fields: list[str], limit: int) -> list[dict[str, Any]]:
        return list(
            self._call(
                "query",
                filter=condition,
                output_fields=fields,
                limit=limit,
                consistency_level="Strong",
                partition_names=[self._partition],
            )
        )

    def _call(self, method: str, **options: Any) -> Any:
        return self._engine.call(method, self._plan.name, **options)


def _ready_collection(engine: Engine, plan: CollectionPlan) -> int:
    """Make the collection if it is not there, check it if it is; return how many partitions it has."""
    made = not engine.call("has_collection", plan.name)
    if made:
        engine.call("create_collection", plan.name, schema=_schema(plan), consistency_level="Bounded")
    _check_fields(engine, plan)
    partitions = _partitions(engine, plan) if made else _await(lambda: _partitions(engine, plan))
    if not partitions:  # made just now, or by one who did not finish
        _finish_collection(engine, plan)
        partitions = _partitions(engine, plan)
    _check_metric(engine, plan)
    engine.call("load_collection", plan.name)
    return partitions


def _partitions(engine: Engine, plan: CollectionPlan) -> int:
    names = set(engine.call("list_partitions", plan.name))
    return next(count for count in range(len(names) + 1) if f"p{count}" not in names)


def _finish_collection(engine: Engine, plan: CollectionPlan) -> None:
    """Make index and partitions, p0 last: once it is there, nothing is missing."""
    index = MilvusClient.prepare_index_params()
    index.add_index(
        "embedding",
        index_type="HNSW",
        metric_type=plan.metric,
        params={"M": plan.links, "efConstruction": plan.effort},
    )
    engine.call("create_index", plan.name, index)
    there = set(engine.call("list_partitions", plan.name))
    for name in (f"p{number}" for number in reversed(range(plan.partitions))):
        if name not in there:
            engine.call("create_partition", plan.name, name)


def _await(count: Callable[[], int]) -> int:
    """Return what there is as soon as it is not nothing, for a while: another process may be at it."""
    until = time.monotonic() + 5
    while not (found := count()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _schema(plan: CollectionPlan) -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("pk", DataType.VARCHAR, is_primary=True, max_length=_KEY_LENGTH)
    for name in ("session", "chunk", "first", "last"):
        schema.add_field(name, DataType.INT64)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=plan.dim)
    return schema


def _check_fields(engine: Engine, plan: CollectionPlan) -> None:
    fields = {each["name"]: each for each in engine.call("describe_collection", plan.name)["fields"]}
    if not fields.keys() >= set(_FIELDS):
        raise InvalidArgumentError(
            f"{_named(engine, plan)} has the fields {', '.join(sorted(fields))}, and not {', '.join(_FIELDS)}: it was "
            "not made by memlong. Name another as collection; one that is not there is made"
        )
    dim = int(fields["embedding"]["params"]["dim"])
    if dim != plan.dim:
        raise InvalidArgumentError(
            f"{_named(engine, plan)} is for embeddings of {dim} numbers, but the bank's have dim {plan.dim}. {_ELSE}"
        )


def _check_metric(engine: Engine, plan: CollectionPlan) -> None:
    names = engine.call("list_indexes", plan.name)
    facts = engine.call("describe_index", plan.name, names[0]) if names else None
    if not facts:
        raise InvalidArgumentError(
            f"{_named(engine, plan)} has no index on its embeddings: it was not made by memlong. {_ELSE}"
        )
    if facts["metric_type"] != plan.metric:
        raise InvalidArgumentError(
            f"{_named(engine, plan)} ranks by {facts['metric_type']}, but the bank's metric needs {plan.metric}. {_ELSE}"
        )


def _named(engine: Engine, plan: CollectionPlan) -> str:
    return f"the collection {plan.name!r} at {engine.address.uri}"
