"""Tables of time and memory: banks, stores, streams and a GPU."""

from __future__ import annotations

from statistics import median
from typing import Any

from cells import load, table

_MIB, _GIB = 2**20, 2**30
_LONG_CONTEXT = ("tokens", "full attention, s", "memory, s", "full: K-V, peak, MiB", "memory: K-V, peak, MiB")


def milliseconds(seconds: float) -> str:
    """Format with three significant digits."""
    ms = 1000 * seconds
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"


def bank() -> str:
    """Times of banks, and their ratios to the bare library's."""
    shown = ("search 1", "search 32", "add 1", "add 32", "retrieve 1", "retrieve 32")
    rows = [
        [row["setting"], f"{row['chunks']:,} x {row['dim']}"]
        + [
            f"{milliseconds(row['bank'][each])} ({row['bank'][each] / row['raw'][each]:.2f})"
            for each in shown
        ]
        for row in load("bank.json")["rows"]
        if "=" not in row["setting"]  # those are only in the plot
    ]
    return table(["backend", "vectors", *(f"{each}, ms" for each in shown)], rows, words=2)


def backends(chunks: int) -> str:
    """Recall, CPU times and index size of each backend."""
    rows = []
    for row in load("backends.json")["rows"]:
        if row["chunks"] == chunks:
            name, _, options = row["setting"].partition(" ")
            recall = f"{row['recall']:.{4 if 0.9995 <= row['recall'] < 1 else 3}f}"
            times = row["cpu"]
            figures = [f"{times['ms_single']:.2f}", f"{times['ms_batch']:.1f}", f"{times['build_s']:.1f}"]
            label = f"`{name.rstrip(',')}`" + (f", {options}" if options else "")
            rows.append([label, recall, *figures, f"{row['index_bytes_per_chunk']:,.0f}"])
    head = ["backend", "recall@8", "ms, 1 query", "ms, 32 queries", "build, s", "index, bytes per chunk"]
    return table(head, rows)


def stores() -> str:
    """Time to gather blocks from each kind of store."""
    found = load("kv.json")
    rows = []
    for ratio in found["ratios"]:
        store, _, other = ratio["name"].removeprefix("speed of ").partition(" to a ")
        rows.append([store, f"{1000 * found['seconds'][store]:.1f}", f"{ratio['value']:.2f}, to a {other}"])
    return table(["store", "ms", "ratio of speeds"], rows)


def peers() -> str:
    """Comparison with another package's memory."""
    found = load("peers.json")
    rows = [
        [name, f"{recall:.3f}", *(f"{1000 * times[name]:.2f}" for times in found["seconds"].values())]
        for name, recall in found["recall"].items()
    ]
    return table(["memory", "recall@8", *(f"{what}, ms" for what in found["seconds"])], rows)


def streaming(file: str) -> str:
    """Reading a text with each backend, against the plain window."""
    found = load(file)
    ratios = {each["name"]: each["value"] for each in found["ratios"]}
    rows = [
        [name, f"{speed:,.0f}", f"{ratios.get(f'streaming, {name}', 1):.2f}"]
        for name, speed in found["streaming"].items()
    ]
    return table(["", "tokens/s", "time, to the plain window's"], rows)


def parts(file: str) -> str:
    """Time of a segment by part."""
    columns = load(file)["parts"]
    rows = [
        [part, *(_share(column, part) for column in columns.values())]
        for part, ms in columns["torch"].items()
        if ms
    ]
    return table(["part, ms per segment", "plain window", "memory, torch"], rows)


def _share(column: dict[str, float], part: str) -> str:
    ms = f"{column[part]:.1f}"
    return "" if ms == "0.0" else f"{ms} ({100 * column[part] / sum(column.values()):.1f} %)"


def generating(file: str) -> str:
    """Time of a generated token."""
    found = load(file)["decoding"]
    names = {"torch": "memory, torch", "transformers": "transformers' own cache of 2,048"}
    mine = found["torch"]["mean_ms"]
    rows = [
        [
            names.get(name, name),
            f"{times['median_ms']:.1f}",
            f"{times['mean_ms']:.1f}",
            "" if name == "torch" else f"{mine / times['mean_ms']:.2f}",
        ]
        for name, times in found.items()
    ]
    return table(["system", "median, ms", "mean, ms", "memory's mean to it"], rows)


def growth() -> str:
    """Time of a segment early and late in a stream."""
    found = load("profile_stream.json")
    early, late = found["ms_per_segment"].values()
    rows = [
        [part, f"{early[part]:.2f}", f"{late[part]:.2f}", f"{late[part] / early[part]:.2f}"]
        for part in early
        if early[part]
    ]
    sums = [sum(ms for part, ms in column.items() if part != "search") for column in (early, late)]
    rows.append(["all but the search", *(f"{each:.2f}" for each in sums), f"{sums[1] / sums[0]:.2f}"])
    return table(["part, ms per segment", "at 8,192", "at 200,192", "ratio"], rows)


def long_context(file: str) -> str:
    """Full attention against memory."""
    rows: dict[int, list[str]] = {}
    sizes: dict[int, list[str]] = {}
    for row in load(file)["rows"]:
        kv, peak = row["device_kv_bytes"] / _MIB, row["peak_bytes"] / _MIB
        rows.setdefault(row["length"], [f"{row['length']:,}"]).append(f"{row['seconds']:.1f}")
        sizes.setdefault(row["length"], []).append(f"{kv:,.{0 if kv == int(kv) else 1}f}, {peak:,.0f}")
    return table(_LONG_CONTEXT, [rows[length] + sizes[length] for length in rows], words=0)


def long_stream() -> str:
    """A million tokens: speed, memory and one passage's perplexity at three places, and speed and memory halfway."""
    found = load("long_stream.json")
    placed = {each["tokens"]: each["perplexity"] for each in found["placed"]}
    first = min(placed.values())
    halfway = next(point["tokens"] for point in found["curve"] if point["tokens"] >= 500_000)
    rows = []
    for point in found["curve"]:
        tokens = point["tokens"]
        if tokens not in placed and tokens != halfway:
            continue
        passage = ""
        if tokens in placed:
            change = 100 * (placed[tokens] / first - 1)
            passage = f"{placed[tokens]:.4f}" + (f" ({change:+.2f} %)" if change else "")
        memory = [f"{point['rss_bytes'] / _GIB:.2f}", f"{point['stored_bytes'] / _GIB:.2f}"]
        rows.append([f"{tokens:,}", f"{point['tokens_per_second']:.0f}", *memory, passage])
    head = ["tokens", "tokens/s", "resident, GiB", "in the bank, GiB", "perplexity of the passage"]
    return table(head, rows, words=0)


def milvus() -> str:
    """Overhead of a bank over pymilvus."""
    found = load("milvus.json")
    rows = []
    for session, each in (("100,000 chunks", found), ("100 chunks, next to 1,001 others", found["crowd"])):
        for what, plain, own in (
            ("search", "pymilvus search", "bank.search"),
            ("search and reads; `retrieve`", "pymilvus search + reads", "bank.retrieve"),
        ):
            times = [each["times"][name] for name in (plain, own)]
            cells = [f"{time['p50_ms']:.1f} / {time['p99_ms']:.1f}" for time in times]
            ratio = each["ratios"][own.removeprefix("bank.")]
            rows.append([session, what, *cells, f"{ratio['p50']:.2f} / {ratio['p99']:.2f}"])
    head = ["session", "what", "pymilvus, p50 / p99 ms", "bank, p50 / p99 ms", "ratio"]
    return table(head, rows, words=2)


def gpu_three_b() -> str:
    """A model of 3B parameters."""
    names = {"layer": "each layer's own", "shared": "one layer's, read by four"}
    rows = [
        [
            names[row["kv_source"]],
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['late_to_early']:.2f}",
            f"{row['device_peak_bytes'] / 1e9:.1f}",
            f"{row['host_bytes'] / 1e9:.1f}",
        ]
        for row in load("gpu/three_b.json")["rows"]
    ]
    head = [
        "K-V source",
        "tokens",
        "seconds",
        "tokens/s",
        "late to early",
        "device peak, GB",
        "K-V in the bank, GB",
    ]
    return table(head, rows)


def gpu_training() -> str:
    """Training steps by K-V source, rows and segment size."""
    rows = [
        [
            row["setting"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ms_per_step']:.0f}",
            f"{row['device_peak_bytes'] / 1e9:.1f}",
        ]
        for row in load("gpu/training.json")["rows"]
    ]
    return table(["K-V source, rows x segment", "tokens/s", "ms per step", "device peak, GB"], rows)


def rows() -> str:
    """Training by the number of rows, now and before."""
    found = [
        [
            str(each["rows"]),
            f"{median(each['before']):,.0f}",
            f"{median(each['now']):,.0f}",
            f"{median(each['ratios']):.2f} ({min(each['ratios']):.2f} to {max(each['ratios']):.2f})",
        ]
        for each in load("rows.json")["by_rows"]
    ]
    return table(["rows", "tokens/s before", "tokens/s", "ratio (lowest to highest)"], found)


def gpu_bank() -> str:
    """The exact bank against FAISS-GPU."""
    rows = []
    by_chunks: dict[int, dict[str, dict[str, Any]]] = {}
    for row in load("gpu/bank.json")["rows"]:
        by_chunks.setdefault(row["chunks"], {})[row["setting"]] = row
    for chunks, settings in by_chunks.items():
        ours, faiss = settings["torch"], settings["faiss Flat"]
        for what in ("search 1", "search 32", "retrieve 1", "add 32"):
            cells = [
                f"{1000 * each['bank'][what]:.3f} ({each['bank'][what] / each['raw'][what]:.2f})"
                for each in (ours, faiss)
            ]
            rows.append(
                [f"{what}, {chunks:,} chunks", *cells, f"{ours['bank'][what] / faiss['bank'][what]:.2f}"]
            )
    return table(["", "torch, ms (to raw)", "FAISS-GPU, ms (to raw)", "torch to FAISS-GPU"], rows)
