"""The collection that many sessions share: made, checked and found."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from pymilvus import DataType, MilvusClient

from memlong.errors import InvalidArgumentError
from memlong_milvus.engine import Engine
from memlong_milvus.sessions import LEAST_UNNAMED

FIELDS = ("pk", "session", "chunk", "first", "last", "embedding")
"""Of a row: its key, the session's number, the chunk's id and span, and what is searched."""

METRICS = {"inner_product": "IP", "l2": "L2"}
"""What Milvus calls a similarity."""

_KEY_LENGTH = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_ORIGIN = "origin_"
_PATIENCE = 5.0  # seconds
_ELSE = "Name another as collection, or leave it out: then each dim and metric has one of its own"


@dataclass(frozen=True)
class Collection:
    """A collection.

    Attributes
    ----------
    name : str
        Its name.
    dim : int
        Width of the embeddings.
    metric : "IP" or "L2"
        What Milvus ranks by.
    partitions : int
        How many it has; a session is in one of them.
    origin : str
        Hexadecimal; another Milvus has none of this name with the same. Empty for one that is not there yet.
    """

    name: str
    dim: int
    metric: str
    partitions: int
    origin: str = ""


def ready_collection(engine: Engine, wanted: Collection, *, links: int, effort: int) -> Collection:
    """Return a collection, made if it is not there and checked if it is, and loaded.

    Parameters
    ----------
    engine : Engine
        Where.
    wanted : Collection
        What it must be like; one that is there keeps the partitions it has.
    links, effort : int
        M and efConstruction of the HNSW graph, for one that is made.

    Raises
    ------
    InvalidArgumentError
        If it can have no such name, or is there, and for other embeddings or not memlong's.
    BackendError
        If Milvus does not answer.
    """
    name = wanted.name
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"collection must have up to 255 letters, digits and underscores, no digit first, got {name!r}"
        )
    with engine.hub.setting_up:
        until = time.monotonic()
        if engine.call("has_collection", name):
            until += _PATIENCE  # another process may be making it
        else:
            engine.call("create_collection", name, schema=_schema(wanted.dim), consistency_level="Bounded")
        dim = _dim(engine, name)
        if dim != wanted.dim:
            raise InvalidArgumentError(
                f"{_named(engine, name)} is for embeddings of {dim} numbers, but the bank's have dim {wanted.dim}. "
                f"{_ELSE}"
            )
        while not (partitions := _partitions(engine, name)) and time.monotonic() < until:
            time.sleep(0.1)
        if not partitions:  # made just now, or by one who did not finish
            _finish_collection(engine, wanted, links, effort)
            partitions = _partitions(engine, name)
        metric = _metric(engine, name)
        if metric != wanted.metric:
            raise InvalidArgumentError(
                f"{_named(engine, name)} ranks by {metric}, but the bank's metric needs {wanted.metric}. {_ELSE}"
            )
        engine.call("load_collection", name)
        if engine.address.is_local and name not in engine.hub.opened:
            # One process has the file, and no bank yet: whose rows have no name there, ended with another process.
            engine.call("delete", name, filter=f"session >= {LEAST_UNNAMED}")
        engine.hub.opened.add(name)
        return Collection(name, dim, metric, partitions, _origin(engine, name))


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
    return Collection(name, dim, metric, partitions, _origin(engine, name))


def _partitions(engine: Engine, name: str) -> int:
    names = set(engine.call("list_partitions", name))
    return next(count for count in range(len(names) + 1) if f"p{count}" not in names)


def _origin(engine: Engine, name: str) -> str:
    """Return what sets this collection apart from those of that name elsewhere: its id, which Lite's have not."""
    if not engine.address.is_local:
        return f"{int(engine.call('describe_collection', name)['collection_id']):x}"
    names = engine.call("list_partitions", name)
    return next(str(each).removeprefix(_ORIGIN) for each in names if each.startswith(_ORIGIN))


def _finish_collection(engine: Engine, wanted: Collection, links: int, effort: int) -> None:
    """Make index and partitions, p0 last: once it is there, nothing is missing."""
    index = MilvusClient.prepare_index_params()
    index.add_index(
        "embedding",
        index_type="HNSW",
        metric_type=wanted.metric,
        params={"M": links, "efConstruction": effort},
    )
    engine.call("create_index", wanted.name, index)
    there = set(engine.call("list_partitions", wanted.name))
    missing = [f"p{number}" for number in reversed(range(wanted.partitions))]
    if engine.address.is_local and not any(name.startswith(_ORIGIN) for name in there):
        missing.insert(0, f"{_ORIGIN}{secrets.token_hex(8)}")
    for name in missing:
        if name not in there:
            engine.call("create_partition", wanted.name, name)


def _schema(dim: int) -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("pk", DataType.VARCHAR, is_primary=True, max_length=_KEY_LENGTH)
    for name in ("session", "chunk", "first", "last"):
        schema.add_field(name, DataType.INT64)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    return schema


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
