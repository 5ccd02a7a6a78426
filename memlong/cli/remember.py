"""``memlong remember``: read documents once, into a corpus that later sessions share."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import escaped
from memlong.cli.corpora import Notes, choose_reader, moment, notes_of, notes_to_keep, settings_of_chunks
from memlong.cli.files import keep_apart
from memlong.cli.loading import machine_of
from memlong.cli.memory import TRAINED, MemoryOptions, described, described_unloaded, with_memory
from memlong.cli.output import JsonOutput, print_table
from memlong.errors import InvalidArgumentError, InvalidTextError

if TYPE_CHECKING:
    from memlong.cli.choice import DecoderChoice
    from memlong.corpus import Corpus, Document
    from memlong.decoder import MemoryDecoder

_SUFFIXES = (".md", ".txt")
_NAMED = 3


@with_memory(
    without=("query_map", *TRAINED, "retrieve_every", "focus_tokens", "answer_cutoff"),
    retrieve_for="answers",
)
def remember(
    ctx: typer.Context,
    *,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE|FOLDER", help="UTF-8 text files, and folders of *.txt and *.md files."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the corpus; begun if there is none.")],
    model: options.ModelUnlessMemory = None,
    adapter: options.Adapter = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Word to filter these documents by; repeatable.")
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="DATE", help="ISO date from which on these documents are not found  [default: never]"
        ),
    ] = None,
    forget: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Document to remove from the corpus; repeatable."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Documents read side by side; saves time on a GPU.")] = 1,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Most bytes of keys, values and embeddings, such as 8GB  [default: no limit]"
        ),
    ] = None,
    memory: MemoryOptions,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
) -> None:
    """Read documents once into a corpus, for memlong ask and memlong chat.

    Repeat the command after files have changed: those that are unchanged are not read again, and files that are gone
    from a folder leave the corpus, as do documents that have expired. A run that was interrupted continues where it
    ended. Model and settings are kept in the corpus; the model is not loaded if there is nothing to read.

    \b
    Examples:
      memlong remember --model demo --out manual manual.txt
      memlong remember --out manual notes --tag notes --expires 2030-01-31
      memlong remember --out manual notes --budget 8GB --json -
      memlong remember --out manual --forget manual.txt
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    files = [path for path in paths or [] if not path.is_dir()]
    keep_apart({"--json": json_file}, {"FILE": files, **memory.files, "--model": [model]})
    output = JsonOutput(json_file)
    if not paths and not forget:
        raise InvalidArgumentError(
            "There is nothing to read: name files or folders, or a document to remove with --forget"
        )
    ends = moment("--expires", expires)
    if ends is not None and ends <= time.time():
        raise InvalidArgumentError(f"--expires must be in the future, got {expires!r}")
    from memlong.bank.sizes import byte_count
    from memlong.bank.snapshot.reader import folder_of
    from memlong.bank.snapshot.writer import check_place
    from memlong.corpus.table import list_documents

    if budget is not None:
        byte_count("--budget", budget)
    notes = notes_of(out)
    known = {each.source for each in list_documents(out)} if notes and forget else set()
    for source in forget or []:
        if source not in known:
            raise InvalidArgumentError(f"--forget must name a document of {str(out)!r}, got {source!r:.200}")
    if notes is None:
        check_place(folder_of(out), "corpus")
    found = _find(paths or [], out)
    about = {"tags": tuple(tag or ()), "expires": ends}
    tally = _Tally()
    result: dict[str, Any] = {"model": notes.model if notes else model}
    choice = None
    if found.files:
        choice = choose_reader(
            ctx,
            notes,
            model,
            adapter,
            memory,
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    corpus = None
    typed = _typed(ctx)
    if choice is None or (notes is not None and _is_of(notes, choice, typed=typed)):
        backend = choice.config.backend if choice is not None and "backend" in typed else None
        corpus = _without_model(out, backend, found, about, tally, forget or [])
    if corpus is None:
        assert choice is not None  # noqa: S101 - without files, no model is needed
        decoder = choice.open()
        is_typed = notes is None or "backend" in typed
        corpus = _opened(out, decoder, model, in_its_backend=is_typed)
        result = {"model": corpus.notes.get("model"), "adapter": adapter, **described(decoder)}
        tally = _Tally()
        tally.remove(corpus, forget or [], found)
        _read(decoder, corpus, found, about, tally, rows=rows, budget=budget)
    elif choice is not None:
        result |= {"adapter": adapter, **described_unloaded(choice.config, choice.dtype)}
    shown = {
        "documents": len(corpus),
        "chunks": len(corpus.bank),
        "bytes": corpus.bank.nbytes,
    }
    names = {"read": tally.read, "unchanged": tally.unchanged, "removed": tally.removed}
    names |= {"left_out": tally.left_out}
    if output.write({**result, "out": str(out), **names, "skipped": found.skipped, **shown}):
        counts = {name.replace("_", " "): len(each) for name, each in names.items()} | shown
        print_table([*counts], [[f"{count:,}" for count in counts.values()]])


@dataclass
class _Found:
    """Text files by source, the folders that were named, and what is not read of those."""

    files: dict[str, Path] = field(default_factory=dict)
    folders: list[PurePosixPath] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def has_lost(self, source: str) -> bool:
        """Whether a document was in one of these folders, and its file is gone."""
        path = PurePosixPath(source)
        is_below = any(
            path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
            for folder in self.folders
        )
        return is_below and source not in self.files and _is_gone(Path(source))


@dataclass
class _Tally:
    """The sources of documents, by what became of them."""

    read: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def remove(self, corpus: Corpus, named: Sequence[str], found: _Found) -> None:
        """Remove documents that were named, have expired, or whose files are gone."""
        self.removed += corpus.expire()
        gone = [each.source for each in corpus.documents if found.has_lost(each.source)]
        for source in dict.fromkeys([*named, *gone]):
            if source in corpus:
                corpus.forget(source)
                self.removed.append(source)


def _find(paths: Sequence[Path], out: Path) -> _Found:
    """Find the text files among what was named.

    Raises
    ------
    InvalidTextError
        If a file that was named cannot be read, or a folder has no text.
    """
    from memlong.evaluation import read_text

    found = _Found()
    for given in paths:
        if not given.is_dir():
            read_text(given)
            found.files[given.as_posix()] = given
            continue
        found.folders.append(PurePosixPath(given.as_posix()))
        texts: list[Path] = []
        others: list[Path] = []
        for path in sorted(path for path in given.rglob("*") if path.is_file()):
            if not path.resolve().is_relative_to(out.resolve()):
                (texts if path.suffix.lower() in _SUFFIXES and _is_text(path) else others).append(path)
        if not texts:
            raise InvalidTextError(
                f"The folder {str(given)!r} has no text in files named *.txt or *.md: give another folder, or the "
                "files themselves. Documents that were read from it stay: remove them with --forget"
            )
        found.files |= {path.as_posix(): path for path in texts}
        found.skipped += [path.as_posix() for path in others]
    _tell_of(found.skipped)
    return found


def _is_gone(path: Path) -> bool:
    """Whether a file is gone, and not merely out of reach."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _is_text(path: Path) -> bool:
    from memlong.evaluation import read_text

    try:
        read_text(path)
    except InvalidTextError:
        return False
    return True


def _tell_of(skipped: Sequence[str]) -> None:
    if skipped:
        named = ", ".join(skipped[:_NAMED]) + (", …" if len(skipped) > _NAMED else "")
        typer.echo(
            escaped(f"not read, as they are no *.txt or *.md text: {len(skipped):,} files ({named})"),
            err=True,
        )


def _typed(context: typer.Context) -> set[str]:
    from memlong.cli.choice import is_given

    return {name for name in context.params if is_given(context, name)}


def _is_of(notes: Notes, choice: DecoderChoice, *, typed: Collection[str]) -> bool:
    """Whether a corpus is of the model, the settings and the backend that were chosen, as far as its notes tell."""
    chosen = {"model": choice.model, "dtype": choice.dtype, "settings": settings_of_chunks(choice.config)}
    told = {"model": notes.model, "dtype": notes.dtype, "settings": dict(notes.settings)}
    return choice.adapter is None and chosen == told and "backend_option" not in typed


def _without_model(
    out: Path,
    backend: str | None,
    found: _Found,
    about: Mapping[str, Any],
    tally: _Tally,
    forget: Sequence[str],
) -> Corpus | None:
    """Do what needs no model, and save that; None if there are documents to read, or it is of another backend."""
    from memlong.corpus import Corpus
    from memlong.corpus.reading import Outcome, unread
    from memlong.plugins.registry import installed_registry

    corpus, registry = Corpus.load(out, kv_device="cpu"), installed_registry()
    if backend is not None and type(corpus.bank) is not registry.load_backend_class(backend):
        return None
    before = corpus.documents
    tally.remove(corpus, forget, found)
    outcome = Outcome([], tally.unchanged, [])
    if next(unread(corpus, _documents(found, about), outcome), None) is not None:
        return None
    if corpus.documents != before:
        corpus.save()
    return corpus


def _opened(out: Path, decoder: MemoryDecoder, model: str | None, *, in_its_backend: bool) -> Corpus:
    """Load the corpus, or begin it; in the decoder's backend, or else in that in which it was saved."""
    from memlong.corpus import Corpus

    if in_its_backend:
        return Corpus.open(out, decoder, notes_to_keep(decoder, model))
    return Corpus.load(out, registry=decoder.registry, kv_device=str(decoder.model.device))


def _read(
    decoder: MemoryDecoder,
    corpus: Corpus,
    found: _Found,
    about: Mapping[str, Any],
    tally: _Tally,
    *,
    rows: int,
    budget: str | None,
) -> None:
    from memlong.corpus import remember as read_into

    tokens = sum(_tokens(decoder, corpus, document) for document in _documents(found, about))
    with (
        decoder,
        tqdm(total=tokens, unit="tok", desc=f"reading ({machine_of(decoder.model)})") as bar,
    ):
        show = _shower(bar)
        outcome = read_into(
            decoder, corpus, _documents(found, about), rows=rows, budget=budget, progress=show
        )
    tally.read, tally.unchanged, tally.left_out = outcome.read, outcome.unchanged, outcome.left_out


def _shower(bar: Any) -> Callable[[Document, int], None]:
    """Return what shows progress: the tokens that memlong puts around a text are not in the bar's total."""

    def show(document: Document, tokens: int) -> None:
        bar.set_postfix_str(escaped(document.title), refresh=False)
        bar.update(min(tokens, bar.total - bar.n))

    return show


def _documents(found: _Found, about: Mapping[str, Any]) -> Iterator[Document]:
    """Read the files, one at a time."""
    from memlong.corpus import Document
    from memlong.evaluation import read_text

    for source, path in found.files.items():
        yield Document(source, read_text(path), title=path.name, time=path.stat().st_mtime, **about)


def _tokens(decoder: MemoryDecoder, corpus: Corpus, document: Document) -> int:
    """Return how many tokens are to be read of a document: none if the corpus has it as it is."""
    from memlong.evaluation import tokenize

    known = corpus.get(document.source)
    if known is not None and known.digest == document.digest:
        return 0
    return int(tokenize(decoder.tokenizer, document.text, begins=False).shape[1])
