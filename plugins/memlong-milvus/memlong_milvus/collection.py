"""The collection that many sessions share: found, made and checked."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from pymilvus import DataType, MilvusClient

from memlong.errors import InvalidArgumentError
from memlong_milvus.connection import Engine
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
    """A collection as it is."""

    name: str
    dim: int
    metric: str
    partitions: int
    origin: str
    """Hexadecimal; no other Milvus has a collection of this name with the same."""


def ready_collection(
    engine: Engine, name: str, dim: int, metric: str, *, partitions: int, links: int, effort: int
) -> Collection:
    """Return a collection, made if it is not there and checked if it is, and loaded.

    ``partitions``, and ``links`` and ``effort`` (M and efConstruction of the HNSW graph), are of one that is made.
    InvalidArgumentError if the name cannot be used, or the collection is for other embeddings or not memlong's.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"collection must have up to 255 letters, digits and underscores, no digit first, got {name!r}"
        )
    with engine.hub.lock:
        until = time.monotonic()
        if engine.call("has_collection", name):
            until += _PATIENCE  # another process may be making it
        else:
            engine.call("create_collection", name, schema=_schema(dim), consistency_level="Bounded")
        while (found := find_collection(engine, name)) is None and time.monotonic() < until:
            time.sleep(0.1)
        if found is None:  # made just now, or by a process that did not finish
            _finish_collection(engine, name, metric, partitions, links, effort)
            found = find_collection(engine, name)
        assert found is not None  # noqa: S101 - it is finished
        where = f"the collection {name!r} at {engine.address.uri}"
        if found.dim != dim:
            raise InvalidArgumentError(
                f"{where} is for embeddings of {found.dim} numbers, but the bank's have dim {dim}. {_ELSE}"
            )
        if found.metric != metric:
            raise InvalidArgumentError(
                f"{where} ranks by {found.metric}, but the bank's metric needs {metric}. {_ELSE}"
            )
        if engine.address.is_local and name not in engine.hub.opened:
            # Only this process has the file, and no bank yet: rows of sessions without a name are left of another one.
            engine.call("delete", name, filter=f"session >= {LEAST_UNNAMED}")
        engine.hub.opened.add(name)
        return found


def find_collection(engine: Engine, name: str) -> Collection | None:
    """Return the collection of this name, loaded; None if there is none, or it is not finished.

    InvalidArgumentError if it was not made by memlong.
    """
    if not engine.call("has_collection", name):
        return None
    facts = engine.call("describe_collection", name)
    fields = {each["name"]: each for each in facts["fields"]}
    where = f"the collection {name!r} at {engine.address.uri}"
    if not fields.keys() >= set(FIELDS):
        raise InvalidArgumentError(
            f"{where} has the fields {', '.join(sorted(fields))}, and not {', '.join(FIELDS)}: it was not made by "
            "memlong. Name another as collection; one that is not there is made"
        )
    there = set(engine.call("list_partitions", name))
    partitions = next(count for count in range(len(there) + 1) if f"p{count}" not in there)
    if not partitions:
        return None
    indexes = engine.call("list_indexes", name)
    index = engine.call("describe_index", name, indexes[0]) if indexes else None
    if not index:
        raise InvalidArgumentError(
            f"{where} has no index on its embeddings: it was not made by memlong. {_ELSE}"
        )
    engine.call("load_collection", name)
    if engine.address.is_local:  # whose ids of collections are not unique
        origin = next(each.removeprefix(_ORIGIN) for each in there if each.startswith(_ORIGIN))
    else:
        origin = f"{int(facts['collection_id']):x}"
    return Collection(
        name, int(fields["embedding"]["params"]["dim"]), str(index["metric_type"]), partitions, origin
    )


def _finish_collection(
    engine: Engine, name: str, metric: str, partitions: int, links: int, effort: int
) -> None:
    """Make index and partitions, p0 last: once it is there, nothing is missing."""
    index = MilvusClient.prepare_index_params()
    build = {"M": links, "efConstruction": effort}
    index.add_index("embedding", index_type="HNSW", metric_type=metric, params=build)
    engine.call("create_index", name, index)
    there = set(engine.call("list_partitions", name))
    missing = [f"p{number}" for number in reversed(range(partitions))]
    if engine.address.is_local and not any(each.startswith(_ORIGIN) for each in there):
        missing.insert(0, f"{_ORIGIN}{secrets.token_hex(8)}")
    for each in missing:
        if each not in there:
            engine.call("create_partition", name, each)


def _schema(dim: int) -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("pk", DataType.VARCHAR, is_primary=True, max_length=_KEY_LENGTH)
    for name in ("session", "chunk", "first", "last"):
        schema.add_field(name, DataType.INT64)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    return schema
