"""Tables of bench/front.py, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cells import perplexity, table

PARTS = {"all": "all tokens", "long_range": "long-range tokens"}
_HEADS = {"all": "gap closed", "long_range": "long-range", "key": "key tokens"}
_COSTS = {
    "segment": ("reading", 1, 2),
    "token": ("generating", 1, 2),
    "K-V read, MB": ("kv_read", 1e6, 1),
    "moved, MB": ("kv_moved", 1e6, 1),
    "stored, kB/token": ("stored_per_token", 1e3, 1),
}


def by_cost(result: Mapping[str, Any], kind: str) -> str:
    """Mean gap closed on texts of a kind, and what it costs if that was measured."""
    costs = result.get("costs", {})
    shown = _COSTS if costs else {}
    rows, systems = [], result["kinds"][kind]["systems"]
    heads = _heads(systems)
    for name, parts in systems.items():
        cost = costs.get(name, {})
        cells = [_number(cost.get(key), scale, digits) for key, scale, digits in shown.values()]
        rows.append([name, *(gap(parts.get(part)) for part in heads), *cells])
    return table(["system", *heads.values(), *shown], rows)


def by_text(result: Mapping[str, Any], text: str) -> str:
    """Perplexity and gap closed on one text."""
    rows, systems = [], result["texts"][text]["systems"]
    heads = _heads(systems)
    for name, parts in systems.items():
        found = [parts.get(part) for part in PARTS]
        perplexities = ["" if each is None else perplexity(each["perplexity"]) for each in found]
        gaps = [gap((parts.get(part) or {}).get("gap_closed")) for part in heads]
        rows.append([name, *perplexities, *gaps])
    return table(["system", "perplexity", "long-range", *heads.values()], rows)


def _heads(systems: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the columns of gaps by part: key tokens only in results that have them."""
    has_keys = any("key" in parts for parts in systems.values())
    return {part: head for part, head in _HEADS.items() if part in PARTS or has_keys}


def gap(found: Mapping[str, float] | None) -> str:
    """Format a gap closed with its interval, in percent; nothing where there is no gap."""
    if found is None:
        return ""
    value, low, high = (f"{100 * found[key]:.0f}" for key in ("value", "low", "high"))
    return f"{value} %" if found["low"] == found["high"] else f"{value} % [{low}, {high}]"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value / scale:,.{digits}f}"
