"""Create a retriever by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from memlong.bank.snapshot.options import SavedOptions
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.retrievers.hybrid import HybridRetriever, numbers_named, retrievers_named
from memlong.errors import InvalidArgumentError
from memlong.plugins import Registry
from memlong.plugins.options import check_options
from memlong.plugins.registry import installed_registry

_OF_MODELS = "sentence-transformers"


def create_retriever(
    name: str,
    model: Any,
    tokenizer: Any,
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
) -> Retriever:
    """Create the retriever of this name for a language model.

    Parameters
    ----------
    name
        A registered name, or a hub id (``owner/model``) or folder of a sentence-transformers model.
    model, tokenizer
        The language model with the memory, and its tokenizer.
    options
        Options of the retriever.
    registry
        The registry to look names up in; the shared one by default.

    Raises
    ------
    UnknownNameError, MissingDependencyError, PluginError
        If the retriever is unknown, lacks a library, or failed to load.
    InvalidArgumentError
        If an option is unknown, or the model cannot be loaded.
    """
    registry = registry or installed_registry()
    given = dict(options or {})
    if _is_model(name, registry):
        name, given = _OF_MODELS, {"name": name, **given}
    retriever = retriever_class(name, registry)
    if issubclass(retriever, HybridRetriever):
        named = retrievers_named(given)
        _check_parts(named, registry)
        parts = [create_retriever(part, model, tokenizer, own, registry) for part, own in named.items()]
        return retriever(parts, **numbers_named(given))
    check_options(f"retriever {name!r}", retriever, given, besides=("model", "tokenizer"))
    return retriever(model, tokenizer, **given)


def retriever_class(name: str, registry: Registry) -> type[Retriever]:
    """Return the class that `create_retriever` instantiates; raises the same errors."""
    name = _OF_MODELS if _is_model(name, registry) else name
    found: type[Retriever] = registry.load_retriever_class(name, Retriever)
    return found


def saved_options(name: str, options: Mapping[str, Any], registry: Registry) -> SavedOptions:
    """Return which options a file, which may be a stranger's, may give the retriever of this name.

    Raises the same errors as `create_retriever`, as far as they are about names.
    """
    retriever = retriever_class(name, registry)
    found = dict(retriever.saved_options)
    if issubclass(retriever, HybridRetriever):
        named = retrievers_named(options)
        _check_parts(named, registry)
        for part in named:
            allowed = retriever_class(part, registry).saved_options
            found |= {f"{part}.{option}": most for option, most in allowed.items()}
    return found


def _check_parts(names: Iterable[str], registry: Registry) -> None:
    """Raise unless all names are registered, as those of retrievers that can be fused."""
    for name in names:
        registry.retriever(name)
        if issubclass(retriever_class(name, registry), HybridRetriever):
            raise InvalidArgumentError(
                f"retrievers must not hold {name!r}, which fuses others itself: name these in its place"
            )


def _is_model(name: str, registry: Registry) -> bool:
    known = {spec.name for spec in registry.list_retrievers()}
    return name not in known and ("/" in name or _is_folder(name))


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # for instance, the name is too long
        return False


def check_made_for(retriever: Retriever | None, model: Any) -> None:
    """Raise InvalidArgumentError if a retriever was created for a model with another vocabulary."""
    other: Any = getattr(retriever, "model", None)
    if isinstance(other, PreTrainedModel):
        embeddings: list[Any] = [each.get_input_embeddings() for each in (other, model)]
        theirs, ours = (each.weight.shape[0] for each in embeddings)
        if theirs != ours:
            raise InvalidArgumentError(
                f"retriever must be for this {type(model).__name__} with {ours:,} tokens, got one for a "
                f"{type(other).__name__} with {theirs:,}: create one for this model, or name one in the MemoryConfig"
            )
