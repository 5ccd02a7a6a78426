"""From what a user names to a retriever at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlong.decoder.retrievers.base import Retriever
from memlong.plugins import Registry
from memlong.plugins.options import check_options


def create_retriever(
    name: str,
    model: Any,
    tokenizer: Any,
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
) -> Retriever:
    """Make the retriever of this name for a language model.

    Parameters
    ----------
    name
        A registered name; or a hub id (``owner/model``) or a folder, which sentence-transformers loads.
    model, tokenizer
        The language model that has the memory, and its tokenizer.
    options
        Options of the retriever.
    registry
        Where names are looked up; a new one by default.

    Raises
    ------
    UnknownNameError, MissingDependencyError, PluginError
        If there is no such retriever, or it lacks something, or did not load.
    InvalidArgumentError
        If an option or a model of that name does not exist.
    """
    registry = registry or Registry()
    given = dict(options or {})
    known = {spec.name for spec in registry.list_retrievers()}
    if name not in known and ("/" in name or _is_folder(name)):
        name, given = "sentence-transformers", {"name": name, **given}
    retriever: type[Retriever] = registry.load_retriever_class(name, Retriever)
    check_options(f"retriever {name!r}", retriever, given, besides=("model", "tokenizer"))
    return retriever(model, tokenizer, **given)


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # such as a name that is too long
        return False
