"""Write the tables of docs/results and docs/choosing-a-backend.md from the benchmarks' JSON files.

A table goes between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    python bench/tables.py             # write the tables of all pages
    python bench/tables.py --check     # only list pages that differ from the JSON files
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tables_alternatives as alternatives
import tables_quality as quality
import tables_speed as speed
from cells import RESULTS

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _tables() -> dict[str, Callable[[], str]]:
    """Return every table, by its name in the pages."""
    found: dict[str, Callable[[], str]] = {
        make.__name__.replace("_", "-"): make
        for make in (
            *(
                quality.dtypes,
                quality.needle,
                quality.retrievers,
                quality.recalled,
                quality.ablation,
                quality.query_maps,
            ),
            *(speed.bank, speed.stores, speed.peers, speed.growth, speed.long_stream, speed.milvus),
            *(speed.gpu_three_b, speed.gpu_bank, speed.gpu_training, speed.rows),
        )
    }
    for part, key in (("all", "overall"), ("long", "long_range")):
        found[f"recall-code-{part}"] = partial(quality.recall, "recall_vs_perplexity.json", key)
        found[f"recall-prose-{part}"] = partial(quality.recall, "recall_vs_perplexity_prose.json", key)
    for part, key in (("all", "all"), ("long", "long_range")):
        found[f"trained-prose-{part}"] = partial(
            quality.trained, "context_lengths_prose.json", "moby_dick.txt", key
        )
        found[f"trained-code-{part}"] = partial(
            quality.trained, "context_lengths_code.json", "all texts", key
        )
    for what in ("perplexity", "ratio"):
        found[f"length-prose-{what}"] = partial(
            quality.by_length, "context_lengths_prose.json", "moby_dick.txt", what
        )
        found[f"length-pydecimal-{what}"] = partial(
            quality.by_length, "context_lengths.json", "_pydecimal.py", what
        )
    for kind in ("code", "prose"):
        found[f"front-{kind}"] = partial(quality.front, "front.json", kind)
        found[f"gap-trained-{kind}"] = partial(quality.front, f"gap_trained_{kind}.json", kind)
        found[f"alternatives-{kind}"] = partial(alternatives.gaps, alternatives.GAPS, kind)
        found[f"alternatives-gemma-{kind}"] = partial(alternatives.gaps, alternatives.GEMMA_GAPS, kind)
        for name in ("gemma", "default"):
            found[f"front-{name}-{kind}"] = partial(quality.front, f"front_{name}.json", kind)
    for text in ("_pydecimal.py", "moby_dick.txt"):
        for name in ("far", "farther"):
            found[f"front-{name}-{text}"] = partial(quality.front_text, f"front_{name}.json", text)
    for text in ("moby_dick.txt", "addresses.txt"):
        found[f"front-positions-{text}"] = partial(quality.front_text, "front_positions.json", text)
    for text in (
        "typing.py",
        "turtle.py",
        "_pydecimal.py",
        "console.py",
        "python.py",
        "_base.py",
        "moby_dick.txt",
    ):
        found[f"front-{text}"] = partial(quality.front_text, "front.json", text)
    for kind, text in (("code", "typing.py"), ("prose", "moby_dick.txt")):
        found[f"choices-{kind}"] = partial(quality.front_text, f"choices_{kind}.json", text)
    found["alternatives"] = alternatives.headline
    found["alternatives-gemma"] = alternatives.headline_gemma
    found["questions"] = partial(alternatives.questions, alternatives.QUESTIONS)
    found["questions-50"] = partial(alternatives.questions, "questions_50.json")
    found["questions-50-reader"] = partial(alternatives.questions, "questions_50_reader.json")
    found["two-books"] = alternatives.two_books
    for name in ("ruler", "more"):
        found[f"equality-{name}"] = partial(alternatives.equality, f"equality_{name}.json")
    found["ruler-mean"] = partial(alternatives.by_length, alternatives.RULER)
    found["ruler"] = partial(alternatives.by_task, alternatives.RULER, 4096)
    found["ruler-lengths"] = partial(alternatives.by_length, "benchmarks_ruler_lengths.json")
    found["ruler-16384"] = partial(alternatives.by_task, "benchmarks_ruler_lengths.json", 16384)
    found["documents"] = partial(alternatives.by_task, "benchmarks_documents.json", 4096)
    found["ruler-gemma"] = partial(alternatives.by_length, alternatives.GEMMA_RULER)
    found["ruler-gemma-tasks"] = partial(alternatives.by_task, alternatives.GEMMA_RULER, 4096)
    found["needles-gemma"] = partial(alternatives.by_length, alternatives.GEMMA_LENGTHS)
    found["needles-lengths"] = partial(alternatives.by_length, alternatives.LENGTHS)
    for length in (16384, 65536):
        found[f"needles-{length}"] = partial(alternatives.by_task, alternatives.LENGTHS, length)
    found["needles-cutoff"] = partial(alternatives.by_length, "benchmarks_cutoff.json")
    found["needles-cutoff-overlap"] = partial(alternatives.by_length, "benchmarks_cutoff_overlap.json")
    found["needles-fewer"] = partial(alternatives.by_task, "benchmarks_fewer.json", 16384)
    for length in (16384, 65536):
        found[f"found-{length}"] = partial(alternatives.found, length)
    found["needles-mean"] = partial(alternatives.by_length, alternatives.NEEDLES)
    found["needles"] = partial(alternatives.by_task, alternatives.NEEDLES, 4096)
    found["babilong"] = partial(alternatives.by_length, alternatives.BABILONG)
    found["babilong-tasks"] = partial(alternatives.by_task, alternatives.BABILONG, 4096)
    found["hard-needle"] = partial(alternatives.by_task, "benchmarks_hard_needle.json", 4096)
    found["babilong-gemma"] = partial(alternatives.by_task, alternatives.GEMMA_BABILONG, 4096)
    for count in (10_000, 100_000):
        found[f"backends-{count}"] = partial(speed.backends, count)
    for prefix, folder in (("", ""), ("gpu-", "gpu/")):
        for make in (speed.streaming, speed.parts, speed.generating):
            found[prefix + make.__name__] = partial(make, f"{folder}decoder.json")
        found[f"{prefix}long-context"] = partial(speed.long_context, f"{folder}long_context.json")
    return found


TABLES = _tables()


def pages() -> list[Path]:
    """Return the pages that may have tables."""
    return [*sorted(RESULTS.glob("*.md")), *RESULTS.parent.glob("choosing-a-backend.md")]


def filled(text: str) -> str:
    """Return a page with up-to-date tables."""
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main(arguments: list[str]) -> int:
    """Write the tables, or with ``--check`` list the pages that differ and return 1 if there are any."""
    stale = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if filled(text) == text:
            continue
        if "--check" in arguments:
            print(f"{page.name}: differs from the JSON files; run python bench/tables.py")
            stale = 1
        else:
            page.write_text(filled(text), encoding="utf-8")
            print(f"{page.name}: written")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
