"""Tables of memory beside what people take instead: of all benches, of RULER, of questions on texts and books."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import benchmark_tables
import found as found_bench
import questions as question_bench
import two_books as book_bench
from cells import load, table
from front_tables import by_cost

GAPS, RULER, QUESTIONS = "alternatives.json", "benchmarks_demo.json", "questions.json"
NEEDLES, LENGTHS, BABILONG = "benchmarks_needles.json", "benchmarks_lengths.json", "benchmarks_babilong.json"
GEMMA_GAPS, GEMMA_RULER = "alternatives_gemma.json", "benchmarks_gemma.json"
GEMMA_LENGTHS, GEMMA_BABILONG = "benchmarks_gemma_needles.json", "benchmarks_babilong_gemma.json"
BOOKS = "two_books.json"


@dataclass(frozen=True)
class Row:
    """A system, and its name in each result; what is a bound or a control is no candidate for the best.

    ``ruler`` is its name in all results of bench/benchmarks.py.
    """

    title: str
    gaps: str = ""
    ruler: str = ""
    questions: str = ""
    is_candidate: bool = True


_ROWS = (
    Row("plain window of 1,024", "window 1024", "window 1,024", is_candidate=False),
    Row("plain window of 2,048", "window 2048", "window 2,048"),
    Row("**memory** (the default)", "before-window 8", "memory", "memory"),
    Row("memory, at one position", "zero 8", "zero 8"),
    Row("memory, trained to recall", ruler="trained"),
    Row("memory, tokens choose among 8 chunks", "pages of 8"),
    Row("memory, tokens choose among 16", "pages of 16", is_candidate=False),
    Row(
        "memory, tokens choose among 64 chunks, here everything", "pages 256", "pages 256", is_candidate=False
    ),
    Row("RAG as text", "RAG as text 8", "RAG as text", "RAG as text"),
    Row("SnapKV", ruler="SnapKV"),
    Row("expected attention", ruler="expected attention"),
    Row("KVzip", ruler="KVzip"),
    Row("InfiniRetri", ruler="InfiniRetri"),
    Row("nearest 1,024 keys of everything", ruler="nearest keys", is_candidate=False),
    Row("4-bit K-V of everything", "4-bit K-V", is_candidate=False),
    Row("2-bit K-V of everything", "2-bit K-V", is_candidate=False),
    Row("random chunks", "random 8", is_candidate=False),
    Row("another text's chunks", "foreign 8", is_candidate=False),
    Row("full attention", "full", "full attention", "full attention", is_candidate=False),
)


@dataclass(frozen=True)
class Column:
    """A measure: of which of its results, and how it is shown."""

    head: str
    of: Callable[[Row], float | None]
    shown: str
    most_is_best: bool = True


def headline() -> str:
    """Systems down, measures across, the best candidate of each in bold."""
    return _across(
        [
            *_gaps(GAPS),
            Column("RULER", _score(RULER, 4096), "{:.0%}"),
            Column("needles, 4k", _score(NEEDLES, 4096), "{:.0%}"),
            *_needles(LENGTHS, 16384, 65536),
            Column("BABILong", _score(BABILONG, 4096), "{:.0%}"),
            Column("first token, s", _question("first_seconds"), "{:.1f}", most_is_best=False),
            Column(
                f"{load(QUESTIONS)['keys']} questions, s",
                _question("all_questions"),
                "{:.0f}",
                most_is_best=False,
            ),
        ]
    )


def headline_gemma() -> str:
    """The same of the second model."""
    return _across(
        [
            *_gaps(GEMMA_GAPS),
            Column("RULER", _score(GEMMA_RULER, 4096), "{:.0%}"),
            *_needles(GEMMA_LENGTHS, 4096, 16384, 65536),
            Column("BABILong", _score(GEMMA_BABILONG, 4096), "{:.0%}"),
        ]
    )


def _needles(file: str, *lengths: int) -> list[Column]:
    return [Column(f"needles, {length // 1024}k", _score(file, length), "{:.0%}") for length in lengths]


def _gaps(file: str) -> list[Column]:
    return [
        Column(head if part == "all" else f"{head}, {name}", _gap(file, kind, part), "{:.0%}")
        for kind, head in (("code", "code"), ("prose", "prose"))
        for part, name in (("all", ""), ("long_range", "far"), ("key", "key"))
    ]


def _across(columns: Sequence[Column]) -> str:
    values = {row: [column.of(row) for column in columns] for row in _ROWS}
    kept = [row for row in _ROWS if any(value is not None for value in values[row])]
    best = [
        (max if column.most_is_best else min)(
            (
                column.shown.format(values[row][place])
                for row in kept
                if row.is_candidate and values[row][place] is not None
            ),
            key=_number,
        )
        for place, column in enumerate(columns)
    ]
    rows = []
    for row in kept:
        cells = []
        for column, value, top in zip(columns, values[row], best, strict=True):
            text = "" if value is None else column.shown.format(value)
            cells.append(f"**{text}**" if text and row.is_candidate and text == top else text)
        rows.append([row.title, *(cell.replace("%", " %") for cell in cells)])
    return table(["system", *(column.head for column in columns)], rows)


def gaps(file: str, kind: str) -> str:
    """Gap closed of each system, with intervals."""
    return by_cost(load(file), kind)


def by_length(file: str) -> str:
    """A benchmark's score by length."""
    found = load(file)
    return benchmark_tables.by_length(found["rows"], found["lengths"])


def by_task(file: str, length: int) -> str:
    """A benchmark's score by task, at one length."""
    found = load(file)
    cells = {
        name: [benchmark_tables.Cell(**each) for each in cells] for name, cells in found["cells"].items()
    }
    return benchmark_tables.by_task(cells, found["tasks"], length)


def found(length: int) -> str:
    """What is retrieved of what RULER's needles ask for, in prompts of one length."""
    return found_bench.shares(load("found.json")["found"][str(length)])


def questions(file: str) -> str:
    """What questions on one text take."""
    return question_bench.shown(load(file))


def two_books() -> str:
    """What questions on two books at once take, and how many are answered."""
    return book_bench.shown(load(BOOKS))


def answers(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of bench/lm_eval_equality.py."""
    head = ["task", "metric", "memlong", "transformers", "requests", "same answers", "largest difference"]
    cells = [
        [
            row["task"],
            row["metric"],
            f"{row['score']:.4g}",
            f"{row['theirs']:.4g}",
            str(row["requests"]),
            "" if row["same"] is None else f"{row['same']} of {row['requests']}",
            "" if row["difference"] is None else f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    return table(head, cells, words=2)


def equality(file: str) -> str:
    """Answers to tasks of lm-eval, beside those of transformers' own model."""
    return answers(load(file)["rows"])


def _number(shown: str) -> float:
    return float(shown.rstrip("%"))


def _gap(file: str, kind: str, part: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found: Mapping[str, Any] = load(file)["kinds"][kind]["systems"].get(row.gaps) or {}
        return found[part]["value"] if found.get(part) else None

    return value


def _score(file: str, length: int) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found: Mapping[str, Any] = load(file)["rows"].get(row.ruler) or {}
        return found[str(length)]["value"] if str(length) in found else None

    return value


def _question(measure: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found: Mapping[str, Any] = load(QUESTIONS)["rows"].get(row.questions) or {}
        return found.get(measure)

    return value
