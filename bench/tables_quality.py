"""Tables of perplexity: recall, dtypes, retrievers, training and context lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cells import interval, load, perplexity, table
from front_tables import by_cost, by_text

_INDEXES = {
    "faiss IVF2,PQ4x4": "faiss `IVF2,PQ4x4`",
    "faiss IVF4, nprobe 1": "faiss `IVF4,Flat`, nprobe 1",
    "faiss IVF4, nprobe 2": "faiss `IVF4,Flat`, nprobe 2",
    "faiss HNSW32": "faiss `HNSW32`",
}
_MAPS = {"retriever": "`lm`", "trained": "`lm`, trained map"}
_OTHERS = ("plain window", "plain window, equal budget")


def merged(systems: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Name the systems; those with identical results share a line."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for system in systems:
        groups.setdefault(json.dumps(system["overall"]), []).append(system)
    return [
        ("; ".join(_INDEXES.get(each["name"], each["name"]) for each in group), group)
        for group in groups.values()
    ]


def recall(file: str, part: str) -> str:
    """Perplexity against the recall of the index."""
    rows = []
    for name, (system, *_) in merged(load(file)["systems"]):
        found = system["recall_at_k"]
        measured = system[part]
        ratios = [interval(measured[f"to_{other}"]) for other in ("window", "equal_budget", "random")]
        rows.append(
            [name, "" if found is None else f"{found:.3f}", perplexity(measured["perplexity"]), *ratios]
        )
    return table(["system", "recall@8", "perplexity", "to window", "to equal budget", "to random"], rows)


def dtypes() -> str:
    """The same run in float32 and in bfloat16."""
    wide = merged(load("recall_vs_perplexity_float32.json")["systems"])
    other = {system["name"]: system["overall"] for system in load("recall_vs_perplexity.json")["systems"]}
    rows = []
    for name, (system, *_) in wide:
        mine, its = system["overall"], other[system["name"]]
        change = 100 * (its["perplexity"] / mine["perplexity"] - 1)
        figures = [perplexity(mine["perplexity"]), perplexity(its["perplexity"]), f"{change:+.2f} %"]
        rows.append([name, *figures, interval(mine["to_window"]), interval(its["to_window"])])
    return table(
        ["system", "float32", "bfloat16", "change", "to window, float32", "to window, bfloat16"], rows
    )


def needle() -> str:
    """Pass keys found, by length and depth."""
    cells = load("needle.json")["cells"]
    depths = sorted({cell["depth"] for cell in cells})
    rows = [
        [
            f"{length:,}",
            *(f"{cell['accuracy']:.0%}".replace("%", " %") for cell in cells if cell["length"] == length),
        ]
        for length in sorted({cell["length"] for cell in cells})
    ]
    return table(["tokens", *(f"depth {depth:g}" for depth in depths)], rows, words=0)


def retrievers() -> str:
    """Perplexity and time by retriever, on code and prose."""
    rows = []
    for code, prose in zip(
        *(load(f"retrievers_{text}.json")["rows"] for text in ("code", "prose")), strict=True
    ):
        figures = [
            perplexity(each[key]) for each in (code, prose) for key in ("perplexity", "long_range_perplexity")
        ]
        rows.append(
            [code["retriever"], *figures, *(f"{each['ms_per_segment']:.0f}" for each in (code, prose))]
        )
    return table(["retriever", "code", "long-range", "prose", "long-range", "ms, code", "ms, prose"], rows)


def query_maps() -> str:
    """Perplexity with the retriever, with trained query maps, and with random chunks."""
    rows = []
    for row in load("query_maps.json")["rows"]:
        for name, found in row["systems"].items():
            ratios = [interval(found[f"to {other}"]) for other in ("retriever", "random")]
            rows.append([row["text"], _MAPS.get(name, name), perplexity(found["perplexity"]), *ratios])
    return table(["text", "chunks of", "perplexity", "to `lm`", "to random"], rows, words=2)


def trained(file: str, text: str, part: str) -> str:
    """Perplexity of the systems of bench/context_lengths.py on one text or all, and its ratios to the baselines."""
    rows = []
    for name, parts in load(file)["ratios"][text].items():
        against = [*_OTHERS, "trained, random chunks" if name == "trained memory" else "random chunks"]
        ratios = [interval(parts[part].get(f"to {other}")) for other in against]
        rows.append([name, perplexity(parts[part]["perplexity"]), *ratios])
    return table(["system", "perplexity", "to window", "to equal budget", "to random"], rows)


def by_length(file: str, text: str, what: str) -> str:
    """Perplexity of the first tokens by length, or its ratio to the plain window's."""
    systems = load(file)["texts"][text]
    lengths = list(systems["plain window"])
    show: Callable[[dict[str, float]], str] = (
        interval if what == "ratio" else lambda cell: perplexity(cell["perplexity"])
    )
    rows = [
        [name, *(show(cells[length]) if length in cells else "" for length in lengths)]
        for name, cells in systems.items()
    ]
    return table(["system", *(f"{int(length):,}" for length in lengths)], rows)


def front(file: str, kind: str) -> str:
    """Mean gap closed on texts of a kind, and what it costs if that was measured."""
    return by_cost(load(file), kind)


def front_text(file: str, text: str) -> str:
    """Perplexity and gap closed on one text."""
    return by_text(load(file), text)


def recalled() -> str:
    """Answers to what has left the window, by kind of memory, kind of facts and chunks."""
    systems = load("recall.json")["systems"]
    shares: dict[tuple[str, str, str], str] = {}
    kinds: dict[str, None] = {}
    for system, found in systems.items():
        for row in found["rows"]:
            share = row["answers"]
            shares[system, row["kind"], row["chunks"]] = (
                f"{share['value']:.0%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
            )
            if row["chunks"] == "retrieved" and row["held"]:
                shares[system, row["kind"], "held"] = f"{row['held']['value']:.0%}"
            kinds[row["kind"]] = None
    chunks = ("retrieved", "held", "random", "foreign", "none", "text")
    rows = []
    for system in systems:
        name, _, tokens = system.rpartition(", ")
        for kind in kinds:
            each = [shares.get((system, kind, which), "") for which in chunks]
            full = shares.get((system, kind, "full attention"))
            if any(each) or full:
                rows.append([name, f"{int(tokens):,}", kind, full or each[0], *each[1:]])
    head = [
        "memory",
        "tokens",
        "facts",
        "right",
        "fact retrieved",
        "random",
        "foreign",
        "without memory",
        "as text",
    ]
    return table(head, rows)


def ablation() -> str:
    """Answers, and the loss of their tokens, by what a training had; too few variables were followed to tell."""
    systems = load("ablation.json")["systems"]
    kinds = ("dictionary", "needles", "variables")
    rows = []
    for system, found in systems.items():
        retrieved = [row for row in found["rows"] if row["chunks"] == "retrieved" and row["kind"] in kinds]
        cells = [f"{row['answers']['value']:.0%} ({row['loss']:.2f})" for row in retrieved]
        random = [row["answers"] for row in found["rows"] if row["chunks"] == "random"]
        right = sum(each["count"] for each in random) / sum(each["trials"] for each in random)
        rows.append([system.rpartition(", ")[0], *cells, f"{right:.0%}"])
    return table(["training", *kinds, "random chunks"], rows)
