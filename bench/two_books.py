r"""Two books as two memories: how exactly a model recalls them, and how fast, beside RAG as text.

Each book is read once, by `memlong remember`, in parts of some 40,000 characters. Then questions on both (see
book_questions.py) are put to both books at once, in processes of their own:

- *memory*: `memlong ask`;
- *RAG as text*: the same chunks, found by the same retriever or by MiniLM, put into the prompt as text (passages.py);
- *no memory*: the model alone, which is what it knows by heart;
- *passage*: the model with the text around the place in its prompt, which is the most it can do.

All questions are put to one process of each system, and a few to a fresh process each, as a user would. A part of the
first book is read a second time, to see whether a memory then says the same. What was read and answered stays in a
folder, so that a run that was interrupted continues.

    python bench/two_books.py --book moby=moby_dick.txt --book addresses=addresses.txt --json out/two_books.json
    python bench/two_books.py --book moby=moby_dick.txt --book addresses=addresses.txt --skip 9 --fresh 0 \
        --system "at zero: ask --position-mode zero" --system "RAG 4: passages --top-k 4"    # to choose settings by
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any

import numpy as np
import torch
import typer
from book_questions import KINDS, Question, questions, words
from cells import table
from ratios import Ratio
from results import Budget, Report

from memlong.corpus import Corpus, Document
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import Share, read_text

MEMORY, RAG, MINILM, NONE, PASSAGE = "memory", "RAG as text", "RAG as text, MiniLM", "no memory", "passage"
_PART = 40_000  # characters
_PASSAGES = Path(__file__).with_name("passages.py")
_COMMANDS = {
    "ask": (sys.executable, "-c", "from memlong.cli import main; main()", "ask", "--dtype", "float32"),
    "passages": (sys.executable, str(_PASSAGES)),
}
_SAMPLES = 10_000


@dataclass(frozen=True)
class System:
    """What answers: a command of ``_COMMANDS``, and more options."""

    name: str
    command: str
    options: tuple[str, ...] = ()

    @classmethod
    def typed(cls, text: str) -> System:
        """Parse ``NAME: COMMAND OPTION...``; raises InvalidArgumentError."""
        name, _, rest = text.partition(":")
        command, *options = shlex.split(rest) or [""]
        if not name.strip() or command not in _COMMANDS:
            raise InvalidArgumentError(
                f"--system must be NAME: ask OPTION... or NAME: passages OPTION..., got {text!r}"
            )
        return cls(name.strip(), command, tuple(options))


SYSTEMS = (
    System(MEMORY, "ask"),
    System(RAG, "passages"),
    System(MINILM, "passages", ("--retriever", "sentence-transformers")),
    System(NONE, "passages", ("--top-k", "0")),
    System(PASSAGE, "passages", ("--top-k", "0")),
)


@dataclass(frozen=True)
class Ran:
    """What a process took, and the JSON it printed."""

    wall: float
    cpu: float
    peak_bytes: int
    told: Any


def main(
    book: Annotated[list[str], typer.Option(metavar="NAME=FILE", help="Name and UTF-8 text; repeatable.")],
    folder: Annotated[Path, typer.Option(help="Where parts and corpora go; what was read stays.")] = Path(
        "out/books"
    ),
    model: Annotated[str, typer.Option(help="Hub id, folder, 'demo' or 'demo-gemma'.")] = "demo",
    latest: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Keep a book's last paragraphs, up to N characters; repeatable."),
    ] = None,
    count: Annotated[int, typer.Option("--questions", min=3, help="Questions for each book.")] = 25,
    skip: Annotated[int, typer.Option(min=0, help="Skip so many of each kind: other questions.")] = 0,
    seed: Annotated[int, typer.Option(help="Random seed of the questions.")] = 0,
    fresh: Annotated[int, typer.Option(min=0, help="Questions put to fresh processes.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each of these is asked.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Only these systems; repeatable.")] = None,
    system: Annotated[
        list[str] | None, typer.Option(metavar="'NAME: ask|passages OPTION...'", help="Another system.")
    ] = None,
    again: Annotated[bool, typer.Option(help="Read a part of the first book a second time.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """Ask two books, each of which was read once, and measure what each system takes."""
    texts = _texts(book, latest or ())
    systems = [each for each in SYSTEMS if not only or each.name in only]
    systems += [System.typed(each) for each in system or ()]
    corpora = {name: folder / "corpora" / name for name in texts}
    reading = {name: _read(folder, name, text, model) for name, text in texts.items()}
    asked = questions(texts, count, seed=seed, skip=skip)
    told = {
        "model": model,
        "dtype": "float32",
        "books": {name: {**_sizes(corpora[name]), "characters": len(texts[name])} for name in texts},
        "reading": reading,
        "seed": seed,
        "skip": skip,
        "max_new_tokens": max_new_tokens,
        "systems": {each.name: [each.command, *each.options] for each in systems},
        "questions": [
            {"book": each.book, "kind": each.kind, "cue": each.cue, "answer": each.answer} for each in asked
        ],
    }
    report = Report(json_file, told, "cpu", Budget())
    asker = Asker([*corpora.values()], model, max_new_tokens, folder / "answers")
    said: dict[str, list[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for each in systems:
        ran = asker.ask_all(each, asked)
        said[each.name] = [answer["answer"] for answer in ran.told["answers"]]
        rows[each.name] = _row(asked, ran)
        report.add({"rows": rows, "said": said})
    if fresh and fresh <= len(asked):
        timed = [each for each in systems if each in SYSTEMS and each.name != PASSAGE]
        some = [*range(0, len(asked), max(1, len(asked) // fresh))][:fresh]
        known = {name: [answers[number] for number in some] for name, answers in said.items()}
        _add_fresh(asker, timed, [asked[number] for number in some], rounds, rows, known, report)
    if MEMORY in said:
        report.add({"differences": _differences(asked, said)}, _ratios(rows))
    if again:
        report.add({"again": _again(folder, next(iter(texts)), corpora, model)})
    typer.echo(shown({"rows": rows}))
    report.end()


class Asker:
    """Puts questions to systems, each time in a new process.

    Parameters
    ----------
    corpora
        Their folders.
    model
        The model's name.
    max_new_tokens
        Tokens of an answer.
    kept
        Folder of what was answered to all questions.
    """

    def __init__(self, corpora: Sequence[Path], model: str, max_new_tokens: int, kept: Path) -> None:
        self._corpora, self._model, self._most, self._kept = corpora, model, max_new_tokens, kept

    def ask_all(self, system: System, asked: Sequence[Question]) -> Ran:
        """Put questions to one process, unless they were."""
        facts = [system.command, system.options, self._model, self._most, _prompts(system, asked)]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        file = self._kept / f"{name}.json"
        if not file.exists():
            ran = self.ask(system, asked)
            self._kept.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(asdict(ran)), encoding="utf-8")
        return Ran(**json.loads(file.read_text(encoding="utf-8")))

    def ask(self, system: System, asked: Sequence[Question]) -> Ran:
        """Put questions to one process."""
        prompts = _prompts(system, asked)
        with TemporaryDirectory() as place:
            file = Path(place, "prompts")
            text = "\n".join(prompts) if system.command == "ask" else json.dumps(prompts)
            file.write_text(text + "\n", encoding="utf-8")
            folders = [part for each in self._corpora for part in ("--memory", str(each))]
            options = ["--model", self._model, "--max-new-tokens", str(self._most), "--prompts", str(file)]
            return run([*_COMMANDS[system.command], *folders, *options, "--json", "-", *system.options])


def _prompts(system: System, asked: Sequence[Question]) -> list[str]:
    if system.name == PASSAGE:
        return [f"{each.passage}\n{each.cue}" for each in asked]
    return [each.cue for each in asked]


def run(command: Sequence[str]) -> Ran:
    """Run a command that prints JSON, and measure its process.

    Raises
    ------
    MemlongError
        If it fails.
    """
    with TemporaryFile("w+", encoding="utf-8") as out, TemporaryFile("w+", encoding="utf-8") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors)  # noqa: S603 - our own commands
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise MemlongError(f"{shlex.join(command):.400} failed: {errors.read()[-2000:]}")
        kib = 1 if sys.platform == "darwin" else 1024
        printed = out.read()
        return Ran(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * kib, json.loads(printed))


def shown(result: Mapping[str, Any]) -> str:
    """Return the table of a result."""
    head = ["system", "right", *KINDS, "first token, s", "with its process, s", "token, ms", "peak, GB"]
    rows = []
    for name, row in result["rows"].items():
        fresh = row.get("fresh")
        times = ["", "", "", ""]
        if fresh:
            times = [
                f"{fresh['first_seconds']:.2f}",
                f"{fresh['whole_seconds']:.1f}",
                f"{1e3 * fresh['token_seconds']:.0f}",
                f"{fresh['peak_bytes'] / 1e9:.2f}",
            ]
        rows.append([name, *(_shown(row["right"][kind]) for kind in ("all", *KINDS)), *times])
    return table(head, rows)


def _shown(share: Mapping[str, Any]) -> str:
    return f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]".replace("%", " %")


def _texts(books: Sequence[str], latest: Sequence[str]) -> dict[str, str]:
    """Read the books, of some only the last paragraphs."""
    texts = {name: read_text(path) for name, path in _pairs("--book", books)}
    for name, most in _pairs("--latest", latest):
        if name not in texts or not most.isdecimal():
            raise InvalidArgumentError(
                f"--latest must be NAME=N, with the name of a book, got '{name}={most}'"
            )
        paragraphs = texts[name].split("\n\n")
        while len(paragraphs) > 1 and sum(map(len, paragraphs)) > int(most):
            del paragraphs[0]
        texts[name] = "\n\n".join(paragraphs)
    return texts


def _pairs(option: str, typed: Iterable[str]) -> Iterable[tuple[str, str]]:
    for each in typed:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise InvalidArgumentError(f"{option} must be NAME=…, with a NAME of letters, got {each!r}")
        yield name, value


def _parts(text: str) -> list[str]:
    """Cut a text between paragraphs."""
    found: list[str] = []
    for paragraph in filter(None, map(str.strip, text.split("\n\n"))):
        if found and len(found[-1]) + 2 + len(paragraph) <= _PART:
            found[-1] += f"\n\n{paragraph}"
        else:
            found.append(paragraph)
    return found


def _read(folder: Path, name: str, text: str, model: str) -> dict[str, Any]:
    """Read a book into a corpus, unless it was; return what that took.

    Raises
    ------
    InvalidArgumentError
        If another text was read, or by another model.
    """
    noted = folder / f"{name}.json"
    parts, out = folder / name, folder / "corpora" / name
    texts = {parts / f"{number:03d}.txt": f"{part}\n" for number, part in enumerate(_parts(text), 1)}
    if noted.exists():
        _check_read(out, texts, model)
    else:
        parts.mkdir(parents=True, exist_ok=True)
        for file in set(parts.glob("*.txt")) - texts.keys():
            file.unlink()  # of another text, which was not read to its end
        for file, part in texts.items():
            if not file.exists() or read_text(file) != part:
                file.write_text(part, encoding="utf-8")
        ran = remember(model, out, parts)
        noted.write_text(
            json.dumps({"seconds": ran.wall, "cpu_seconds": ran.cpu, "peak_bytes": ran.peak_bytes}),
            encoding="utf-8",
        )
    found: dict[str, Any] = json.loads(noted.read_text(encoding="utf-8"))
    return found


def _check_read(out: Path, texts: Mapping[Path, str], model: str) -> None:
    """Check that a corpus is of these texts, and of this model."""
    corpus = Corpus.load(out)
    read = {each.source: each.digest for each in corpus.documents}
    if read != {file.as_posix(): Document(file.as_posix(), part).digest for file, part in texts.items()}:
        raise InvalidArgumentError(
            f"{str(out)!r} was read from another text, or from another part of it (--latest): name another --folder"
        )
    if corpus.notes.get("model") != model:
        raise InvalidArgumentError(
            f"{str(out)!r} was read by {corpus.notes.get('model')!r}, and --model is {model!r}: name another --folder"
        )


def remember(model: str, out: Path, *paths: Path) -> Ran:
    """Read documents in a process of its own."""
    words = ["remember", "--model", model, "--dtype", "float32", "--out", str(out), "--json", "-"]
    return run([*_COMMANDS["ask"][:3], *words, *map(str, paths)])


def _sizes(folder: Path) -> dict[str, int]:
    """Return what a corpus has, and its bytes on disk: all, and what RAG as text needs of them."""
    corpus = Corpus.load(folder)
    tokens = sum(each.tokens for each in corpus.documents)
    return {
        "documents": len(corpus),
        "tokens": tokens,
        "chunks": len(corpus.bank),
        "bytes": sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()),
        "text_bytes": len(corpus.bank) * corpus.bank.dim * 4 + tokens * 4,
    }


def _row(asked: Sequence[Question], ran: Ran) -> dict[str, Any]:
    answers = ran.told["answers"]
    right = [each.is_answered_by(answer["answer"]) for each, answer in zip(asked, answers, strict=True)]
    of_kinds = {
        kind: [mine for each, mine in zip(asked, right, strict=True) if each.kind == kind] for kind in KINDS
    }
    return {
        "right": {
            kind: asdict(share)
            for kind, mine in {"all": right, **of_kinds}.items()
            if (share := Share.of(mine)) is not None
        },
        "found": _found(asked, answers),
        "prompt_tokens": median(each["prompt_tokens"] for each in answers),
        **_times(answers),
        "peak_bytes": ran.peak_bytes,
        "cpu_seconds": ran.cpu,
    }


def _found(asked: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return for how many questions the passages have the cue's last words and the answer; None without passages."""
    if not any(each.get("passages") for each in answers):
        return None
    found = [
        " ".join([*words(each.cue)[-3:], *words(each.answer)])
        in " ".join(words(" ".join(answer["passages"])))
        for each, answer in zip(asked, answers, strict=True)
    ]
    share = Share.of(found)
    return None if share is None else asdict(share)


def _times(answers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    each = list(answers)
    further = [one["seconds_per_token"] for one in each if one["seconds_per_token"] is not None]
    return {
        "first_seconds": median(one["seconds_to_first_token"] for one in each),
        "token_seconds": median(further) if further else 0.0,
    }


def _add_fresh(
    asker: Asker,
    systems: Sequence[System],
    asked: Sequence[Question],
    rounds: int,
    rows: dict[str, dict[str, Any]],
    known: Mapping[str, Sequence[str]],
    report: Report,
) -> None:
    """Ask each system each question in a fresh process, in turns; of each, the fastest of the rounds counts.

    ``known`` has each system's answers to the same questions, when it was asked all of them at once.
    """
    ran: dict[str, list[list[Ran]]] = {each.name: [[] for _ in asked] for each in systems}
    for _ in range(rounds):
        for number, question in enumerate(asked):
            for each in systems:
                ran[each.name][number].append(asker.ask(each, [question]))
        for each in systems:
            rows[each.name]["fresh"] = _fresh_row(ran[each.name], known[each.name])
        report.add({"rows": rows})


def _fresh_row(ran: Sequence[Sequence[Ran]], known: Sequence[str]) -> dict[str, Any]:
    best = [
        {
            "seconds_to_first_token": min(_only(each)["seconds_to_first_token"] for each in runs),
            "seconds_per_token": min(_only(each)["seconds_per_token"] or 0.0 for each in runs),
            "whole": min(each.wall - _after_first(each) for each in runs),
            "cpu": min(each.cpu for each in runs),
            "peak": max(each.peak_bytes for each in runs),
        }
        for runs in ran
    ]
    return {
        "questions": len(best),
        "same_answers": sum(
            _only(runs[0])["answer"] == answer for runs, answer in zip(ran, known, strict=True)
        ),
        **_times(best),
        "whole_seconds": median(each["whole"] for each in best),
        "cpu_seconds": median(each["cpu"] for each in best),
        "peak_bytes": max(each["peak"] for each in best),
    }


def _only(ran: Ran) -> Any:
    (answer,) = ran.told["answers"]
    return answer


def _after_first(ran: Ran) -> float:
    """Return the seconds between the first token and the last."""
    answer = _only(ran)
    found: float = (answer["seconds_per_token"] or 0.0) * (answer["new_tokens"] - 1)
    return found


def _differences(asked: Sequence[Question], said: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return what the memory answers rightly more than each other system, paired by question."""
    right = {
        name: np.array([each.is_answered_by(one) for each, one in zip(asked, answers, strict=True)])
        for name, answers in said.items()
    }
    drawn = np.random.default_rng(0).integers(0, len(asked), (_SAMPLES, len(asked)))
    found = {}
    for name, others in right.items():
        if name != MEMORY:
            more = right[MEMORY].astype(int) - others
            low, high = np.quantile(more[drawn].mean(axis=1), [0.025, 0.975])
            found[name] = {
                "value": float(more.mean()),
                "low": float(low),
                "high": float(high),
                "only_memory": int((more > 0).sum()),
                "only_other": int((more < 0).sum()),
            }
    return found


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> list[Ratio]:
    memory = rows[MEMORY].get("fresh", rows[MEMORY])
    return [
        Ratio(f"{what}, {name} / {MEMORY}", row.get("fresh", row)[measure] / memory[measure], at_least=True)
        for name, row in rows.items()
        if name in (RAG, MINILM)
        for measure, what in (("first_seconds", "first token"), ("whole_seconds", "with its process"))
        if measure in memory
    ]


def _again(folder: Path, name: str, corpora: Mapping[str, Path], model: str) -> dict[str, Any]:
    """Read the first part of a book a second time, alone, and compare what is stored."""
    part = min((folder / name).glob("*.txt"))
    with TemporaryDirectory(dir=folder) as place:
        ran = remember(model, Path(place, "corpus"), part)
        second, first = Corpus.load(Path(place, "corpus")), Corpus.load(corpora[name])
        document, known = second.documents[0], first.get(part.as_posix())
        if known is None:
            raise MemlongError(f"{str(corpora[name])!r} has no document {part.as_posix()!r}: read it again")
        theirs = first.bank.fetch(torch.arange(known.first_id, known.first_id + known.chunks))
        mine = second.bank.fetch(second.bank.ids)
        same = all(
            torch.equal(getattr(mine, side), getattr(theirs, side)) for side in ("keys", "values", "spans")
        )
    return {
        "source": part.name,
        "tokens": document.tokens,
        "seconds": ran.wall,
        "cpu_seconds": ran.cpu,
        "same_keys_and_values": same,
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"two_books: {error}") from error
