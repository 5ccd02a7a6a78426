"""Which memory settings the folder of a trained decoder may choose, since it may come from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from memlong.bank.snapshot.options import OF_EVERY_BANK, SavedOptions, refused_option
from memlong.decoder.config import MemoryConfig
from memlong.decoder.retrievers.create import retriever_class, saved_options
from memlong.errors import HIDDEN, InvalidArgumentError, MemlongError
from memlong.plugins import Registry
from memlong.plugins.registry import installed_registry
from memlong.uri import scheme_of, without_credentials


def chosen_config(
    folder: Path,
    where: str,
    said: Mapping[str, Any],
    changes: Mapping[str, Any],
    registry: Registry | None = None,
) -> MemoryConfig:
    """Return the settings of a decoder: its folder's, except where the user says otherwise.

    Parameters
    ----------
    folder
        Where it is.
    where
        The file that says it, for messages.
    said
        Fields of the MemoryConfig.
    changes
        The user's.
    registry
        Where the backend and the retriever are looked up; a new one by default.

    Raises
    ------
    InvalidArgumentError
        If the folder names a place to connect to, read from or write to, or an option that no file may choose.
    TypeError, ValueError
        If it contains something that is not a setting.
    """
    memory = dict(said)
    unknown = memory.keys() - {each.name for each in fields(MemoryConfig)}
    if unknown:
        raise TypeError(f"memory holds {', '.join(sorted(unknown))}, which are not settings")
    for field in ("maps", "gates", "null_chunk", "query_map"):
        if memory.get(field):
            if Path(memory[field]).name != memory[field]:
                raise ValueError(f"{field} must be the name of a file in the folder, got {memory[field]!r}")
            memory[field] = str(folder / memory[field])
    for field in ("backend", "retriever"):
        if field in changes and changes[field] != memory.get(field):
            memory[f"{field}_options"] = {}
            if field == "retriever":
                memory["query_map"] = None
    if memory.get("store") and "store" not in changes:
        raise _for_the_user(where, "store", memory["store"], "a place to write to")
    config = MemoryConfig(**{**memory, **changes})
    if "backend" not in changes and scheme_of(config.backend or ""):
        raise _for_the_user(
            where, "backend", without_credentials(config.backend or ""), "a place to connect to"
        )
    registry = registry or installed_registry()
    known = {spec.name for spec in registry.list_retrievers()}
    if "retriever" not in changes and config.retriever not in known:
        raise _for_the_user(
            where, "retriever", config.retriever, "a model to download, or a place on this machine"
        )
    for field, (cls, allowed) in _declared(config, changes, registry).items():
        if refused := _refused(cls, getattr(config, field), allowed):
            raise InvalidArgumentError(f"{where!r} {refused}. Here that is changes={{{field!r}: {{...}}}}")
    return config


def is_on_another_host(name: str | None) -> bool:
    """Whether Windows would log in to a stranger's host for this model name."""
    return name is not None and name.startswith(("//", "\\\\"))


def declared_options(config: MemoryConfig, registry: Registry) -> dict[str, dict[str, Any]]:
    """Return the options of a configuration's backend and retriever for a file, as ``as_dict`` does.

    Those that their classes let a file choose hold nothing secret, and are not hidden.
    """
    found = config.as_dict()
    for field, (_, allowed) in _declared(config, {}, registry).items():
        given = getattr(config, field)
        found[field] |= {name: given[name] for name in given.keys() & allowed.keys()}
    return {field: found[field] for field in ("backend_options", "retriever_options")}


def _declared(
    config: MemoryConfig, changes: Mapping[str, Any], registry: Registry
) -> dict[str, tuple[type, SavedOptions]]:
    """By field, the class whose options the folder gives, if it gives any, and which of them it may."""
    found: dict[str, tuple[type, SavedOptions]] = {}
    if config.backend and config.backend_options and "backend_options" not in changes:
        bank: Any = registry.load_backend_class(config.backend)
        found["backend_options"] = bank, {**OF_EVERY_BANK, **bank.saved_options}
    if config.retriever_options and "retriever_options" not in changes:
        retriever = retriever_class(config.retriever, registry)
        allowed = saved_options(config.retriever, config.retriever_options, registry)
        found["retriever_options"] = retriever, allowed
    return found


def _refused(cls: type, options: Mapping[str, Any], allowed: SavedOptions) -> str:
    if hidden := [name for name, value in options.items() if value == HIDDEN]:
        return f"hides the option {hidden[0]!r}, as it may be secret: give it yourself when loading"
    return refused_option(cls, options, allowed)


def _for_the_user(where: str, field: str, value: object, what: str) -> MemlongError:
    return InvalidArgumentError(
        f"{where!r} has {field} {value!r}, {what}, which no file may choose, since it may come from a stranger. Name "
        f"it yourself: changes={{{field!r}: ...}}, or --{field}"
    )
