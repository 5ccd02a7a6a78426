"""How accurate must a vector index be for a language model's memory to pay off?

Streams one text through a model with memories from random to exact and plots perplexity on identical tokens against
recall@k. Two plain windows serve as baselines: the same local window without memory, and one as long as local and
retrieved tokens together (the baseline to beat). Random chunks are the control: any gain over them comes from
retrieving the right chunks. Systems whose indexes find the same chunks throughout share one run of the model.

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
from same_chunks import Asked, Found, RememberingRetriever, chunks_found
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, PluginManager, Registry, hookimpl, load_model
from memlong.bank import IndexRows
from memlong.decoder import choose_machine, create_retriever
from memlong.errors import MemlongError
from memlong.evaluation import Perplexity, Ratio, evaluate_perplexity, perplexity_ratio, read_text, tokenize
from memlong.settings import documented, setting
from memlong.versions import versions
from memlong_torch.index import TorchIndex

TEXT = Path(inspect.getfile(typing))
WINDOW = "plain window"
EQUAL = "plain window, equal budget"


@documented
@dataclass(frozen=True)
class NoisyOptions:
    """The options of a `NoisyIndex`."""

    noise: float = setting(1.0, "Probability of a swap; 1 is random retrieval.", least=0, most=1)
    seed: int = setting(0, "Random seed of the swaps.", least=0)


class NoisyIndex(TorchIndex):
    """Exact search that replaces each result with a random chunk with a given probability, to set any recall."""

    options_class = NoisyOptions
    options: Any

    def __init__(self, rows: IndexRows, options: Any) -> None:
        super().__init__(rows, options)
        self._random = np.random.default_rng(options.seed)

    def search(self, queries: Any, k: int) -> Any:
        """Find the best chunks and replace some."""
        return np.stack([self._swap(row) for row in super().search(queries, k)])

    def _swap(self, found: Any) -> Any:
        kept = found[self._random.random(len(found)) >= self.options.noise]
        others = np.setdiff1d(self.rows.ids, kept)
        return np.concatenate([kept, self._random.choice(others, len(found) - len(kept), replace=False)])


class NoisyPlugin:
    """A complete plugin with a custom backend."""

    @hookimpl
    def memlong_register_backends(self, register: Any) -> None:
        """Register the index above as ``noisy``."""
        register("noisy", f"{__name__}:NoisyIndex", description="exact search with random mistakes")


@dataclass(frozen=True)
class Variant:
    """A memory of the sweep; with several ``options``, each is run and their losses are averaged."""

    name: str
    backend: str
    options: tuple[dict[str, Any], ...] = ({},)


# From poor to exact. The poor ones are degraded on purpose: at default settings, indexes hardly miss on a single text.
RANDOM = Variant("random, 3 seeds", "noisy", tuple({"noise": 1.0, "seed": seed} for seed in range(3)))
SWEEP = (
    RANDOM,
    Variant("half random", "noisy", ({"noise": 0.5},)),
    Variant(
        "faiss IVF2,PQ4x4", "faiss", ({"index": "IVF2,PQ4x4", "nprobe": 2, "refine": 1, "train_size": 16},)
    ),
    Variant("faiss IVF4, nprobe 1", "faiss", ({"index": "IVF4,Flat", "nprobe": 1, "train_size": 16},)),
    Variant("faiss IVF4, nprobe 2", "faiss", ({"index": "IVF4,Flat", "nprobe": 2, "train_size": 16},)),
    Variant("hnswlib, M 2, ef 1", "hnswlib", ({"M": 2, "ef_construction": 4, "ef": 1},)),
    Variant("hnswlib", "hnswlib"),
    Variant("faiss HNSW32", "faiss", ({"index": "HNSW32"},)),
    Variant("torch (exact)", "torch"),
)


@dataclass(frozen=True)
class Measure:
    """Perplexity over a subset of the tokens, and its ratios to the three baselines."""

    perplexity: float
    to_window: Ratio
    to_equal_budget: Ratio
    to_random: Ratio


@dataclass(frozen=True)
class System:
    """A system and its results, over all scored tokens and over the long-range ones."""

    name: str
    backend: str
    options: tuple[dict[str, Any], ...]
    attention_budget: int
    recall_at_k: float | None
    perplexity_of_each: tuple[float, ...]
    overall: Measure
    long_range: Measure | None


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own typing.py.")] = TEXT,
    retriever: Annotated[
        str, typer.Option(help="Retriever by name, hub id or folder.")
    ] = "sentence-transformers",
    max_tokens: Annotated[int, typer.Option(help="Use the first N tokens.")] = 12288,
    score_from: Annotated[int, typer.Option(help="Index of the first scored token.")] = 4096,
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.")] = 128,
    top_k: Annotated[int, typer.Option(help="Chunks retrieved per segment.")] = 8,
    local_window: Annotated[
        int, typer.Option(help="Local tokens attended to, including the segment.")
    ] = 1024,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
    out: Annotated[Path, typer.Option(help="Output folder for the JSON file and the plot.")] = Path("out"),
) -> None:
    """Plot perplexity against the recall of the memory's index."""
    out.mkdir(parents=True, exist_ok=True)
    machine = choose_machine(dtype, device)
    dtype, device = machine.names
    typer.echo(f"loading the model… {machine}", err=True)
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    input_ids = tokenize(tokenizer, read_text(text), max_tokens)
    memory = MemoryConfig(
        retriever=retriever,
        chunk_size=chunk_size,
        top_k=top_k,
        local_window=local_window,
        position_mode="zero",  # the paper's
    )
    retrieved = chunk_size * top_k
    window = replace(memory, backend=None)
    configs = {
        WINDOW: (window,),
        EQUAL: (replace(window, local_window=local_window + retrieved),),
        **{
            variant.name: tuple(
                replace(memory, backend=variant.backend, backend_options=options)
                for options in variant.options
            )
            for variant in SWEEP
        },
    }
    registry = Registry(_plugins())
    encoder = RememberingRetriever(create_retriever(retriever, language_model, tokenizer, registry=registry))
    asked: Asked = []
    known: dict[Found, Perplexity] = {}
    runs: dict[str, list[Perplexity]] = {name: [] for name in configs}
    turns = [(name, config) for name, group in configs.items() for config in group]
    with tqdm(total=len(turns) * input_ids.shape[1], unit="tok", postfix=f"{device}, {dtype}") as bar:
        for name, config in turns:
            bar.set_description(name)
            found = chunks_found(config, asked, encoder, registry) if config.backend and asked else None
            if found in known:
                runs[name].append(known[found])
                bar.update(input_ids.shape[1])
                continue
            encoder.asked = []
            with MemoryDecoder(
                language_model, tokenizer, config, retriever=encoder, registry=registry
            ) as decoder:
                run = evaluate_perplexity(
                    decoder,
                    input_ids,
                    score_from=score_from,
                    long_range_distance=local_window,
                    progress=bar.update,
                )
            runs[name].append(run)
            if config.backend:
                asked = encoder.asked
                known[found or chunks_found(config, asked, encoder, registry)] = run
    systems = [_system(name, group, runs) for name, group in configs.items()]
    marked = runs[WINDOW][0].long_range
    about = {
        "model": model,
        "text": text.name,
        "tokens": input_ids.shape[1],
        "scored_tokens": int(marked.size),
        "long_range_tokens": int(marked.sum()),
        "retriever": retriever,
        "chunk_size": chunk_size,
        "top_k": top_k,
        "local_window": local_window,
        "dtype": dtype,
        "device": device,
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


def _system(name: str, configs: tuple[MemoryConfig, ...], runs: dict[str, list[Perplexity]]) -> System:
    config, found = configs[0], runs[name]
    retrieved = config.chunk_size * config.top_k if config.backend else 0
    recalls = [run.recall_at_k for run in found if run.recall_at_k is not None]
    marked = found[0].long_range
    return System(
        name=name,
        backend=config.backend or "none",
        options=tuple(dict(each.backend_options) for each in configs),
        attention_budget=config.local_window + retrieved,
        recall_at_k=float(np.mean(recalls)) if recalls else None,
        perplexity_of_each=tuple(run.perplexity for run in found),
        overall=_measure(name, runs, np.ones_like(marked)),
        long_range=_measure(name, runs, marked) if marked.any() else None,
    )


def _measure(name: str, runs: dict[str, list[Perplexity]], where: Any) -> Measure:
    losses = {each: np.mean([run.token_nll for run in found], axis=0) for each, found in runs.items()}
    window, equal, random = (
        perplexity_ratio(losses[name], losses[baseline], where=where)
        for baseline in (WINDOW, EQUAL, RANDOM.name)
    )
    return Measure(float(np.exp(losses[name][where].mean())), window, equal, random)


def _print(systems: list[System], about: dict[str, Any]) -> None:
    typer.echo(f"\n{about['model']} on {about['text']}: all {about['scored_tokens']:,} scored tokens\n")
    _print_table(systems, [system.overall for system in systems], about)
    typer.echo(f"\nThe {about['long_range_tokens']:,} long-range tokens among them\n")
    _print_table(systems, [system.long_range for system in systems], about)
    typer.echo("\nRatios with 95 % intervals (paired block bootstrap).")


def _print_table(systems: list[System], measures: list[Measure | None], about: dict[str, Any]) -> None:
    table = Table(box=box.MARKDOWN)
    table.add_column("system", no_wrap=True)
    recall = f"recall@{about['top_k']}"
    for column in ("budget", recall, "perplexity", "to window", "to equal budget", "to random"):
        table.add_column(column, justify="right", no_wrap=True)
    for system, measure in zip(systems, measures, strict=True):
        if measure is None:  # the text has no such tokens
            continue
        table.add_row(
            system.name,
            f"{system.attention_budget:,}",
            "" if system.recall_at_k is None else f"{system.recall_at_k:.3f}",
            _digits(measure.perplexity),
            *(_interval(ratio) for ratio in (measure.to_window, measure.to_equal_budget, measure.to_random)),
        )
    Console(width=150).print(table)


def _digits(perplexity: float) -> str:
    return f"{perplexity:.{3 if perplexity < 10 else 2 if perplexity < 100 else 1}f}"


def _interval(ratio: Ratio) -> str:
    if ratio.low == ratio.high == 1.0:  # itself
        return "1"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _draw(systems: list[System], about: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharex=True)
    _draw_panel(axes[0], systems, [system.overall for system in systems])
    _draw_panel(axes[1], systems, [system.long_range for system in systems])
    axes[0].set(title="all scored tokens", ylabel="perplexity / perplexity of the plain window")
    axes[1].set(title="long-range tokens")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axis in axes:
        axis.set_xlabel(f"recall@{about['top_k']} against exact search")
    figure.suptitle(f"{about['model']} on {about['text']}, chunks of {about['chunk_size']} tokens")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_panel(axis: Any, systems: list[System], measures: list[Measure | None]) -> None:
    points: dict[tuple[float, Ratio], list[str]] = {}  # systems that found the same chunks are one point
    baselines = iter(("-", "--"))
    for system, measure in zip(systems, measures, strict=True):
        if measure is None:
            continue
        if system.recall_at_k is None:
            axis.axhline(measure.to_window.value, linestyle=next(baselines), color="grey", label=system.name)
        else:
            points.setdefault((system.recall_at_k, measure.to_window), []).append(system.name)
    for (recall, ratio), names in points.items():
        bars = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
        axis.errorbar(recall, ratio.value, bars, fmt="o", capsize=3, label="\n".join(names))


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"recall_vs_perplexity: {error}") from error
