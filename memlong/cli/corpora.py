"""Corpora on the command line: what the notes of one say of its model, and filters by document."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from re import fullmatch
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlong.cli.choice import DecoderChoice, choose_decoder, is_given
from memlong.cli.memory import MemoryOptions, option_of, values_of
from memlong.decoder.config import MemoryConfig
from memlong.errors import InvalidArgumentError, SnapshotError
from memlong.plugins.registry import installed_registry

if TYPE_CHECKING:
    from torch import Tensor

    from memlong.bank import LayeredBank, MemoryBank
    from memlong.corpus import Corpus
    from memlong.decoder import MemoryDecoder
    from memlong.plugins import Registry

MemoryFolders = Annotated[
    list[Path], typer.Option("--memory", metavar="DIR", help="Corpus to read; repeatable.")
]

# What chunks depend on so much that others cannot be added or read.
_FIXED = ("chunk_size", "embedding_overlap", "retriever", "kv_source", "memory_layer", "retrieval_layers")
_OF_CHUNKS = (
    "chunk_size",
    "embedding_overlap",
    "retriever",
    "retriever_options",
    "kv_source",
    "memory_layer",
    "retrieval_layers",
    "retrieval_heads",
    "retrieve_for",
)


@dataclass(frozen=True)
class Notes:
    """What a corpus says of the model that read it; it may come from a stranger.

    Attributes
    ----------
    where
        The file that says it.
    model
        The model's name; None if unknown.
    settings
        Fields of the MemoryConfig that its chunks depend on.
    dtype
        The model's dtype; None if unknown.
    """

    where: Path
    model: str | None
    settings: Mapping[str, Any]
    dtype: str | None

    def known_model(self) -> str:
        """Return the model's name if a file may choose it.

        Raises
        ------
        InvalidArgumentError
            If there is none, or it is a place on this machine.
        """
        if self.model is None:
            raise InvalidArgumentError(f"--model is missing, and {str(self.where)!r} names none: give it")
        is_id = fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.model) and not self.model.endswith(".gguf")
        if not is_id or Path(self.model).exists():
            raise InvalidArgumentError(
                f"{str(self.where)!r} names the model {self.model!r:.200}, a place on this machine, which no file may "
                "choose, since it may come from a stranger. Name it yourself: --model"
            )
        return self.model


def notes_of(folder: Path) -> Notes | None:
    """Read the notes of the corpus in a folder; None if there is no snapshot.

    Raises
    ------
    SnapshotError
        If the folder holds something else, or its notes are damaged.
    """
    from memlong.bank.snapshot.manifest import MANIFEST, Manifest, has_manifest
    from memlong.bank.snapshot.reader import folder_of, open_snapshot
    from memlong.decoder.model.machine import DTYPES

    folder = folder_of(folder)
    if not has_manifest(folder):
        return None

    def read(manifest: Manifest) -> Notes:
        if manifest.corpus is None:
            raise SnapshotError(
                f"{str(folder)!r} holds the snapshot of a {manifest.kind}, and no corpus: name a folder that memlong "
                "remember wrote"
            )
        notes = manifest.corpus.notes
        try:
            model, settings = notes.get("model"), notes.get("settings", {})
            if not (model is None or isinstance(model, str)) or settings.keys() - set(_OF_CHUNKS):
                raise ValueError("they are not those of memlong remember")
            if settings:  # they do not tell the overlap if the corpus was made without one
                settings = {"embedding_overlap": 0, **settings}
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise SnapshotError(
                f"{str(folder / MANIFEST)!r} has notes that cannot be read: {error}"
            ) from error
        origin = manifest.banks[0].origin if manifest.banks else None
        dtype = (origin or {}).get("dtype")
        return Notes(folder / MANIFEST, model, settings, dtype if dtype in list(DTYPES) else None)

    return open_snapshot(folder, read, None)


def needed_notes(folders: Sequence[Path]) -> Notes:
    """Read the notes of the first of several corpora, and check that the others are there.

    Raises
    ------
    InvalidArgumentError
        If a folder is named twice.
    SnapshotError
        If a folder holds no corpus, or its notes are damaged.
    """
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise InvalidArgumentError(f"--memory names {str(folder)!r} twice: name each corpus once")
        seen.add(folder.resolve())
    found = [notes_of(each) for each in folders]
    for folder, notes in zip(folders, found, strict=True):
        if notes is None:
            raise SnapshotError(
                f"{str(folder)!r} holds no corpus: read documents into it first, with memlong remember --out {folder}"
            )
    first = found[0]
    assert first is not None  # noqa: S101 - none is, as was checked
    return first


def choose_reader(
    context: typer.Context,
    notes: Notes | None,
    model: str | None,
    adapter: str | None,
    memory: MemoryOptions,
    *,
    seed: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> DecoderChoice:
    """Return the decoder that the options choose, and the notes of a corpus where they do not.

    Raises
    ------
    InvalidArgumentError
        As `choose_decoder`, or if the notes choose what no file may, or an option differs from what a corpus was
        read with.
    SnapshotError
        If the settings in the notes cannot be used.
    """
    from memlong.decoder.persistence.strangers import chosen_config

    if memory.typed["backend"] == "none":
        raise InvalidArgumentError(
            "--backend must name a backend, got 'none': without one there is no memory"
        )
    why = ""
    if notes is not None and notes.dtype is not None and dtype == "auto":
        dtype, why = notes.dtype, f"as {notes.where.parent} was read"
    if adapter is not None or notes is None:
        choice = choose_decoder(
            context,
            model,
            adapter,
            memory,
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        return replace(choice, why=why)
    typed = values_of(MemoryConfig, memory.typed)
    options = {each.name: option_of(each) for each in fields(MemoryConfig)}
    given = {name: value for name, value in typed.items() if is_given(context, options[name])}
    try:
        config = chosen_config(
            notes.where.parent, str(notes.where), notes.settings, given, installed_registry()
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise SnapshotError(f"{str(notes.where)!r} has settings that cannot be used: {error}") from error
    _check_fixed(notes, config, given, "--out" if "out" in context.params else "--memory")
    return DecoderChoice(
        model or notes.known_model(), None, config, {}, dtype, device, trust_remote_code, why
    )


def _check_fixed(notes: Notes, config: MemoryConfig, given: Collection[str], place: str) -> None:
    """Refuse options that differ from what a corpus was read with."""
    known = {spec.name for spec in installed_registry().list_retrievers()}
    for name in _FIXED:
        if name not in given or name not in notes.settings:
            continue
        kept, typed = notes.settings[name], getattr(config, name)
        if kept == typed or (
            name == "retriever" and kept not in known
        ):  # the same model may be elsewhere here
            continue
        raise InvalidArgumentError(
            f"--{name.replace('_', '-')} must be {'the default' if kept is None else kept}, with which "
            f"{str(notes.where.parent)!r} was read, got {typed}: leave it out, or use another {place}"
        )


def notes_to_keep(decoder: MemoryDecoder, model: str | None) -> dict[str, Any]:
    """Return the notes of a corpus that a decoder begins: the model's name, and what chunks depend on."""
    from memlong.decoder.model.loading import NAME

    settings = settings_of_chunks(decoder.config, decoder.registry)
    return {"model": model or getattr(decoder.model, NAME, None), "settings": settings}


def settings_of_chunks(config: MemoryConfig, registry: Registry | None = None) -> dict[str, Any]:
    """Return what chunks depend on, of a configuration whose backend and retriever are looked up in a registry."""
    from memlong.decoder.persistence.strangers import declared_options

    known = config.as_dict() | declared_options(config, registry or installed_registry())
    known["embedding_overlap"] = config.overlap_length
    return {name: known[name] for name in _OF_CHUNKS}


def load_corpora(folders: Sequence[Path], decoder: MemoryDecoder) -> list[Corpus]:
    """Load corpora for a decoder to read, keys and values left on disk.

    Raises
    ------
    SnapshotError
        If a folder holds no corpus, or a damaged one.
    """
    from memlong.corpus import Corpus

    device = str(decoder.model.device)
    return [Corpus.load(each, registry=decoder.registry, kv_device=device) for each in folders]


def open_ids(
    corpora: Sequence[Corpus],
    *,
    tags: Sequence[str] = (),
    sources: Sequence[str] = (),
    since: float | None = None,
    until: float | None = None,
) -> list[Tensor | None]:
    """Return the ids of the chunks that may be found in each corpus, or None for all of it.

    Raises
    ------
    InvalidArgumentError
        If no document passes the filters.
    """
    is_filtered = bool(tags or sources) or since is not None or until is not None
    found = [
        corpus.ids(tags=tags, sources=sources, since=since, until=until)
        if is_filtered or any(each.expires is not None for each in corpus.documents)
        else None
        for corpus in corpora
    ]
    if is_filtered and not any(each is not None and len(each) for each in found):
        raise InvalidArgumentError(
            "No document passes --tag, --since, --until and --document together: leave one out, or see what there is "
            "with memlong bank info"
        )
    return found


def moment(option: str, text: str | None) -> float | None:
    """Return the seconds since 1970 of an ISO date or time, in local time unless it names a zone.

    Raises
    ------
    InvalidArgumentError
        If it is none.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidArgumentError(
            f"{option} must be an ISO date or time, such as 2026-01-31 or 2026-01-31T12:00, got {text!r:.80}"
        ) from error


def layered(
    decoder: MemoryDecoder,
    corpora: Sequence[Corpus],
    among: Sequence[Tensor | None],
    top: MemoryBank | None = None,
) -> LayeredBank:
    """Make a bank over corpora: a new one of the decoder, or this top."""
    from memlong.bank import LayeredBank

    top = top or decoder.new_bank()
    assert top is not None  # noqa: S101 - a command about corpora has a backend
    return LayeredBank(top, [each.bank for each in corpora], among=among)
