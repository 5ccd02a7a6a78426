"""The collection that many sessions share: made, checked and found."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pymilvus import DataType, MilvusClient

from memlong.errors import InvalidArgumentError
from memlong_milvus.engine import Engine
from memlong_milvus.sessions import LEAST_UNNAMED

FIELDS = ("pk", "session", "chunk", "first", "last", "embedding")
"""Of a row: its key, the session's number, the chunk's id and span, and what is searched."""

_METRICS = {"inner_product": "IP", "l2": "L2"}
_KEY_LENGTH = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_ORIGIN = "origin_"
_ELSE = "Name another as collection, or leave it out: then each dim and metric has one of its own"


@dataclass(frozen=True)
class Collection:
    """A collection that is there.

    Attributes
    ----------
    name : str
        Its name.
    origin : str
        Hexadecimal; another Milvus has none of this name with the same.
    dim : int
        Width of the embeddings.
    metric : "IP" or "L2"
        What Milvus ranks by.
    partitions : int
        How many it has; a session is in one of them.
    """

    name: str
    origin: str
    dim: int
    metric: str
    partitions: int


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


def ready_collection(engine: Engine, plan: CollectionPlan) -> Collection:
    """Return the collection, made if it is not there and checked if it is, and loaded.

    Raises
    ------
    InvalidArgumentError
        If it can have no such name, or is there, and for other embeddings or not memlong's.
    BackendError
        If Milvus does not answer.
    """
    if not isinstance(plan.name, str) or not _NAME.fullmatch(plan.name):
        raise InvalidArgumentError(
            f"collection is {plan.name!r}; expected up to 255 letters, digits and underscores, no digit first"
        )
    with engine.hub.setting_up:
        partitions = _ready(engine, plan)
        if engine.address.is_local and plan.name not in engine.hub.opened:
            # One process has the file, and no bank yet: whose rows have no name there, ended with another process.
            engine.call("delete", plan.name, filter=f"session >= {LEAST_UNNAMED}")
        engine.hub.opened.add(plan.name)
        return Collection(plan.name, _origin(engine, plan.name), plan.dim, plan.metric, partitions)


def find_collection(engine: Engine, name: str) -> Collection | None:
    """Return the collection of this name, as it is; None if there is none.

    Raises
    ------
    InvalidArgumentError
        If it was not made by memlong.
    BackendError
        If Milvus does not answer.
    """
    if not engine.call("has_collection", name):
        return None
    dim, metric, partitions = _dim(engine, name), _metric(engine, name), _partitions(engine, name)
    if not partitions:
        return None
    engine.call("load_collection", name)
    return Collection(name, _origin(engine, name), dim, metric, partitions)


def _ready(engine: Engine, plan: CollectionPlan) -> int:
    made = not engine.call("has_collection", plan.name)
    if made:
        engine.call("create_collection", plan.name, schema=_schema(plan), consistency_level="Bounded")
    _check_fields(engine, plan)
    partitions = _partitions(engine, plan.name) if made else _await(lambda: _partitions(engine, plan.name))
    if not partitions:  # made just now, or by one who did not finish
        _finish_collection(engine, plan)
        partitions = _partitions(engine, plan.name)
    _check_metric(engine, plan)
    engine.call("load_collection", plan.name)
    return partitions


def _partitions(engine: Engine, name: str) -> int:
    names = set(engine.call("list_partitions", name))
    return next(count for count in range(len(names) + 1) if f"p{count}" not in names)


def _origin(engine: Engine, name: str) -> str:
    """Return what sets this collection apart from those of that name elsewhere: its id, which Lite's have not."""
    if not engine.address.is_local:
        return f"{int(engine.call('describe_collection', name)['collection_id']):x}"
    names = engine.call("list_partitions", name)
    return next(str(each).removeprefix(_ORIGIN) for each in names if each.startswith(_ORIGIN))


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
    wanted = [f"p{number}" for number in reversed(range(plan.partitions))]
    if engine.address.is_local and not any(name.startswith(_ORIGIN) for name in there):
        wanted.insert(0, f"{_ORIGIN}{secrets.token_hex(8)}")
    for name in wanted:
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
    dim = _dim(engine, plan.name)
    if dim != plan.dim:
        raise InvalidArgumentError(
            f"{_named(engine, plan.name)} is for embeddings of {dim} numbers, but the bank's have dim {plan.dim}. "
            f"{_ELSE}"
        )


def _check_metric(engine: Engine, plan: CollectionPlan) -> None:
    metric = _metric(engine, plan.name)
    if metric != plan.metric:
        raise InvalidArgumentError(
            f"{_named(engine, plan.name)} ranks by {metric}, but the bank's metric needs {plan.metric}. {_ELSE}"
        )


def _dim(engine: Engine, name: str) -> int:
    fields = {each["name"]: each for each in engine.call("describe_collection", name)["fields"]}
    if not fields.keys() >= set(FIELDS):
        raise InvalidArgumentError(
            f"{_named(engine, name)} has the fields {', '.join(sorted(fields))}, and not {', '.join(FIELDS)}: it was "
            "not made by memlong. Name another as collection; one that is not there is made"
        )
    return int(fields["embedding"]["params"]["dim"])


def _metric(engine: Engine, name: str) -> str:
    indexes = engine.call("list_indexes", name)
    facts = engine.call("describe_index", name, indexes[0]) if indexes else None
    if not facts:
        raise InvalidArgumentError(
            f"{_named(engine, name)} has no index on its embeddings: it was not made by memlong. {_ELSE}"
        )
    return str(facts["metric_type"])


def _named(engine: Engine, name: str) -> str:
    return f"the collection {name!r} at {engine.address.uri}"
