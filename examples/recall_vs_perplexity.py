"""How good must a vector index be, for a language model's memory to pay?

Streams one text through a model with memories from random to exact, over the same tokens, and sets perplexity against
recall@k. Two plain windows stand beside them: the same local window without memory, and a window as long as local and
retrieved tokens together (the baseline to beat).

    python examples/recall_vs_perplexity.py
    python examples/recall_vs_perplexity.py --text book.txt --max-tokens 32768 --score-from 8192 --out out
"""

from __future__ import annotations

import inspect
import json
import typing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import typer
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from memlong import MemoryBank, MemoryConfig, MemoryDecoder, PluginManager, Registry, hookimpl, load_model
from memlong.decoder import create_retriever
from memlong.errors import MemlongError
from memlong.evaluation import Perplexity, Ratio, evaluate_perplexity, perplexity_ratio, read_text, tokenize
from memlong.evaluation.environment import versions

TEXT = Path(inspect.getfile(typing))


class NoisyBank(MemoryBank):
    """Exact search that swaps each chunk found for a random one, with a given probability: recall at will.

    Parameters
    ----------
    dim
        Width of the embeddings.
    noise
        Probability of a swap; 1 is random retrieval.
    """

    def __init__(self, dim: int, *, noise: float = 1.0, **bank_options: Any) -> None:
        super().__init__(dim, **bank_options)
        self._noise = noise
        self._random = np.random.default_rng(0)

    def _index_search(self, queries: Any, k: int) -> Any:
        exact = self._rank_exactly(queries, k).ids
        return np.stack([self._swap(row) for row in exact])

    def _swap(self, found: Any) -> Any:
        kept = found[self._random.random(len(found)) >= self._noise]
        others = np.setdiff1d(self._table.ids, kept)
        return np.concatenate([kept, self._random.choice(others, len(found) - len(kept), replace=False)])

    def _index_add(self, ids: Any, embeddings: Any) -> None:
        pass

    def _index_remove(self, ids: Any) -> None:
        pass

    def _index_reset(self) -> None:
        pass


class NoisyPlugin:
    """All that it takes to bring a backend of one's own."""

    @hookimpl
    def memlong_register_backends(self, register: Any) -> None:
        """Register the bank above as ``noisy``."""
        register("noisy", f"{__name__}:NoisyBank", description="exact search with random mistakes")


# From poor to exact. The poor ones are crippled on purpose: at their usual settings indexes hardly miss on one text.
SWEEP: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("random", "noisy", {"noise": 1.0}),
    ("half random", "noisy", {"noise": 0.5}),
    ("faiss IVF2,PQ4x4", "faiss", {"index": "IVF2,PQ4x4", "nprobe": 2, "refine": 1, "train_size": 16}),
    ("faiss IVF4, nprobe 1", "faiss", {"index": "IVF4,Flat", "nprobe": 1, "train_size": 16}),
    ("faiss IVF4, nprobe 2", "faiss", {"index": "IVF4,Flat", "nprobe": 2, "train_size": 16}),
    ("hnswlib, M 2, ef 1", "hnswlib", {"M": 2, "ef_construction": 4, "ef": 1}),
    ("hnswlib", "hnswlib", {}),
    ("faiss HNSW32", "faiss", {"index": "HNSW32"}),
    ("torch (exact)", "torch", {}),
)


@dataclass(frozen=True)
class System:
    """One row of the table: what it is and what it measured; ratios are to the plain window."""

    name: str
    backend: str
    options: dict[str, Any]
    attention_budget: int
    recall_at_k: float | None
    perplexity: float
    ratio: Ratio
    long_range_perplexity: float | None
    long_range_ratio: Ratio | None
    tokens_per_second: float


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own typing.py.")] = TEXT,
    retriever: Annotated[
        str, typer.Option(help="Retriever by name, hub id or folder.")
    ] = "sentence-transformers",
    max_tokens: Annotated[int, typer.Option(help="Use the first N tokens.")] = 12288,
    score_from: Annotated[int, typer.Option(help="First token that is scored.")] = 4096,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 128,
    top_k: Annotated[int, typer.Option(help="Chunks retrieved for a segment.")] = 8,
    local_window: Annotated[int, typer.Option(help="Local tokens attended to, the segment included.")] = 1024,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'cuda:N'.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the picture.")] = Path("out"),
) -> None:
    """Set perplexity against the recall of the memory's index."""
    out.mkdir(parents=True, exist_ok=True)
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    input_ids = tokenize(tokenizer, read_text(text), max_tokens)
    memory = MemoryConfig(retriever=retriever, chunk_size=chunk_size, top_k=top_k, local_window=local_window)
    retrieved = chunk_size * top_k
    window = replace(memory, backend=None)
    configs = {
        "plain window": window,
        "plain window, equal budget": replace(window, local_window=local_window + retrieved),
        **{name: replace(memory, backend=b, backend_options=options) for name, b, options in SWEEP},
    }
    registry = Registry(_plugins())
    encoder = create_retriever(retriever, language_model, tokenizer, registry=registry)
    measured: dict[str, Perplexity] = {}
    with tqdm(total=len(configs) * input_ids.shape[1], unit="tok") as bar:
        for name, config in configs.items():
            bar.set_description(name)
            with MemoryDecoder(
                language_model, tokenizer, config, retriever=encoder, registry=registry
            ) as decoder:
                measured[name] = evaluate_perplexity(
                    decoder,
                    input_ids,
                    score_from=score_from,
                    long_range_distance=local_window,
                    progress=bar.update,
                )
    systems = [_system(name, configs[name], measured) for name in configs]
    about = {
        "model": model,
        "text": text.name,
        "tokens": input_ids.shape[1],
        "scored_tokens": int(measured["plain window"].token_nll.size),
        "long_range_tokens": int(measured["plain window"].long_range.sum()),
        "retriever": retriever,
        "chunk_size": chunk_size,
        "top_k": top_k,
        "local_window": local_window,
        "dtype": dtype,
        "versions": versions(),
    }
    result = {**about, "systems": [asdict(system) for system in systems]}
    (out / "recall_vs_perplexity.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _draw(systems, about, out / "recall_vs_perplexity.png")
    _print(systems, about)
    typer.echo(f"Written: {out / 'recall_vs_perplexity.json'} and {out / 'recall_vs_perplexity.png'}")


def _plugins() -> PluginManager:
    manager = PluginManager()
    manager.register(NoisyPlugin(), name="noisy-example")
    return manager


def _system(name: str, config: MemoryConfig, measured: dict[str, Perplexity]) -> System:
    found, base = measured[name], measured["plain window"]
    retrieved = config.chunk_size * config.top_k if config.backend else 0
    return System(
        name=name,
        backend=config.backend or "none",
        options=dict(config.backend_options),
        attention_budget=config.local_window + retrieved,
        recall_at_k=found.recall_at_k,
        perplexity=found.perplexity,
        ratio=perplexity_ratio(found.token_nll, base.token_nll),
        long_range_perplexity=found.long_range_perplexity,
        long_range_ratio=perplexity_ratio(found.token_nll, base.token_nll, where=base.long_range)
        if base.long_range.any()
        else None,
        tokens_per_second=found.tokens / found.seconds,
    )


def _print(systems: list[System], about: dict[str, Any]) -> None:
    table = Table(box=box.MARKDOWN)
    table.add_column("system", no_wrap=True)
    recall = f"recall@{about['top_k']}"
    for column in (
        "budget",
        recall,
        "perplexity",
        "to plain window",
        "long-range",
        "to plain window",
        "tokens/s",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for system in systems:
        distant = system.long_range_perplexity
        table.add_row(
            system.name,
            f"{system.attention_budget:,}",
            "" if system.recall_at_k is None else f"{system.recall_at_k:.3f}",
            f"{system.perplexity:.3f}",
            _interval(system.ratio),
            "" if distant is None else f"{distant:.2f}",
            _interval(system.long_range_ratio),
            f"{system.tokens_per_second:.0f}",
        )
    Console(width=140).print(table)
    typer.echo(
        f"{about['model']} on {about['text']}: {about['scored_tokens']:,} scored tokens, "
        f"{about['long_range_tokens']:,} of them long-range. Ratios with 95 % intervals (paired block bootstrap)."
    )


def _interval(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _draw(systems: list[System], about: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharex=True)
    _draw_panel(axes[0], systems, [system.ratio for system in systems])
    _draw_panel(axes[1], systems, [system.long_range_ratio for system in systems])
    axes[0].set(title="all scored tokens", ylabel="perplexity / perplexity of the plain window")
    axes[1].set(title="long-range tokens")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axis in axes:
        axis.set_xlabel(f"recall@{about['top_k']} against exact search")
    figure.suptitle(f"{about['model']} on {about['text']}, chunks of {about['chunk_size']} tokens")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_panel(axis: Any, systems: list[System], ratios: list[Ratio | None]) -> None:
    taken: dict[float, int] = {}
    baselines = iter(("-", "--"))
    for system, ratio in zip(systems, ratios, strict=True):
        if ratio is None:  # the text has no such token
            continue
        if system.recall_at_k is None:
            axis.axhline(ratio.value, linestyle=next(baselines), color="grey", label=system.name)
            continue
        place = round(system.recall_at_k, 2)
        taken[place] = taken.get(place, 0) + 1
        bars = [[max(0.0, ratio.value - ratio.low)], [max(0.0, ratio.high - ratio.value)]]
        x = system.recall_at_k + 0.015 * (taken[place] - 1)  # side by side where they coincide
        axis.errorbar(x, ratio.value, bars, fmt="o", capsize=3, label=system.name)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"recall_vs_perplexity: {error}") from error
