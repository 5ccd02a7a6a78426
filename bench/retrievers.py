"""Which chunks help a language model most: retrievers beside what one might use instead, by perplexity and cost.

Beside the retrievers that memlong has, candidates that are not in it: BM25, the model's own token embeddings, hidden
states, keys and queries, and mixtures. All score by what comes before a segment alone. A row's cost is the time that
embedding or scoring took in its own run; for hidden states and keys it leaves out the model's pass over the text, and
BM25 is indexed anew at each query.

    python bench/retrievers.py                                             # Python's own typing.py
    python bench/retrievers.py --text moby_dick.txt --max-tokens 24576 --score-from 8192 --row lm --row BM25
"""

from __future__ import annotations

import importlib
import inspect
import json
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, Passage, Retriever, load_model
from memlong.decoder import create_retriever
from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError
from memlong.evaluation import evaluate_perplexity, read_text, tokenize
from memlong.evaluation.environment import versions

TEXT = Path(inspect.getfile(typing))
PAST = 64  # queries of a segment's last tokens that look for keys
Score = Callable[[Sequence[Passage], Passage], Tensor]
"""From the chunks in the bank and a query to the chunks' scores [chunks]."""


class Timed(Retriever):
    """Another retriever, and the seconds that it took."""

    def __init__(self, inner: Retriever) -> None:
        super().__init__(inner.model, inner.tokenizer)
        self._inner = inner
        self.metric = inner.metric  # type: ignore[misc] - of one object
        self.seconds = 0.0

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._inner.dim

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Embeddings of the chunks."""
        return self._timed(self._inner.embed_chunks, chunks)

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Embeddings of the queries."""
        return self._timed(self._inner.embed_queries, queries)

    def _timed(self, embed: Callable[[Sequence[Passage]], Tensor], passages: Sequence[Passage]) -> Tensor:
        started = time.perf_counter()
        found = embed(passages)
        self.seconds += time.perf_counter() - started
        return found


class Scored(Retriever):
    """Any way to score chunks, as a retriever: a chunk is a direction of its own, a query the scores of them all."""

    metric = "inner_product"

    def __init__(self, score: Score, most: int) -> None:
        super().__init__(None, None)
        self._score = score
        self._most = most
        self._chunks: list[Passage] = []

    @property
    def dim(self) -> int:
        """As many as there may be chunks."""
        return self._most

    def embed_chunks(self, chunks: Sequence[Passage]) -> Tensor:
        """Unit vectors."""
        first = len(self._chunks)
        self._chunks += chunks
        return torch.eye(self._most)[first : len(self._chunks)]

    def embed_queries(self, queries: Sequence[Passage]) -> Tensor:
        """Scores, no chunk left out."""
        found = torch.zeros(len(queries), self._most)
        for row, query in enumerate(queries):
            scores = self._score(self._chunks, query).float()
            found[row, : len(scores)] = scores
        return found


class States:
    """What the layers of a model made of a text, streamed over the plain window."""

    def __init__(self, model: Any, tokenizer: Any, input_ids: Tensor) -> None:
        self._inputs: dict[int, list[Tensor]] = {}
        with MemoryDecoder(model, tokenizer, MemoryConfig(backend=None)) as decoder:
            self._modules = decoder.model_layout.modules
            hooks = [
                module.register_forward_pre_hook(self._note(layer), with_kwargs=True)
                for layer, module in enumerate(self._modules)
            ]
            decoder.read(input_ids)
            for hook in hooks:
                hook.remove()

    def hidden(self, layer: int) -> Tensor:
        """What the attention of a layer was given [tokens, hidden], float32."""
        return torch.cat(self._inputs[layer]).float()

    def keys_and_queries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Without positions [tokens, kv_heads, head_dim]; queries of heads that share keys are averaged."""
        module: Any = self._modules[layer]
        hidden = torch.cat(self._inputs[layer])
        with torch.no_grad():
            keys = module.k_proj(hidden).float().unflatten(-1, (-1, module.head_dim))
            queries = module.q_proj(hidden).float().unflatten(-1, (keys.shape[1], -1, module.head_dim))
        return keys, queries.mean(dim=2)

    def _note(self, layer: int) -> Any:
        def note(_module: Any, arguments: Any, named: Any) -> None:
            given = arguments[0] if arguments else named["hidden_states"]
            self._inputs.setdefault(layer, []).append(given[0].detach())

        return note


def bm25(chunks: Sequence[Passage], query: Passage) -> Tensor:
    """BM25 over tokens, of the chunks there are."""
    try:
        library = importlib.import_module("bm25s")
    except ImportError as error:
        raise MissingDependencyError("The row BM25 needs the package bm25s: pip install bm25s") from error
    index = library.BM25()
    vocabulary = {
        token: place for place, token in enumerate(sorted({t for c in chunks for t in c.token_ids}))
    }
    corpus = [[vocabulary[token] for token in chunk.token_ids] for chunk in chunks]
    index.index((corpus, vocabulary), show_progress=False)
    return torch.from_numpy(
        index.get_scores_from_ids([vocabulary[t] for t in query.token_ids if t in vocabulary])
    )


def pooled(states: Tensor) -> Score:
    """Cosine of mean states [tokens, width], the mean of all before the segment taken away."""
    sums = torch.cat([states.new_zeros(1, states.shape[1]), states]).double().cumsum(dim=0)

    def mean(passage: Passage) -> Tensor:
        return (sums[passage.end] - sums[passage.start]) / (passage.end - passage.start)

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        common = sums[query.end] / query.end
        means = torch.stack([mean(chunk) for chunk in chunks]) - common
        return normalize(means, dim=1) @ normalize(mean(query) - common, dim=0)

    return score


def token_vectors(vectors: Tensor, input_ids: Tensor) -> Score:
    """Cosine of the sums of token embeddings, each over the square root of how often the token came before."""

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        counts = torch.bincount(input_ids[: query.end], minlength=len(vectors)).clamp_min(1)

        def total(passages: Sequence[Passage]) -> Tensor:
            tokens = torch.tensor([passage.token_ids for passage in passages])
            return normalize((vectors[tokens] / counts[tokens].sqrt()[..., None]).sum(dim=1), dim=1)

        return total(chunks) @ total([query])[0]

    return score


def attention(keys: Tensor, queries: Tensor) -> Score:
    """How much the latest queries would attend to each chunk, heads and queries alike."""

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        blocks = torch.stack([keys[chunk.start : chunk.end] for chunk in chunks])
        blocks = blocks - keys[: query.end].mean(dim=0)
        logits = torch.einsum("qhd,cnhd->hqcn", queries[query.end - PAST : query.end], blocks)
        mass = (logits / keys.shape[-1] ** 0.5).logsumexp(dim=-1)
        return (mass - mass.mean(dim=-1, keepdim=True)).mean(dim=(0, 1))

    return score


def embedding(retriever: Retriever) -> Score:
    """Cosine of a retriever's embeddings, each made once."""
    made: list[Tensor] = []

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        if len(chunks) > len(made):
            made.extend(normalize(retriever.embed_chunks(chunks[len(made) :]).float(), dim=1))
        return torch.stack(made) @ normalize(retriever.embed_queries([query])[0].float(), dim=0)

    return score


def mixed(*scores: Score) -> Score:
    """The sum of standardised scores."""

    def score(chunks: Sequence[Passage], query: Passage) -> Tensor:
        each = torch.stack([one(chunks, query) for one in scores])
        spread = each.std(dim=1, keepdim=True) if len(chunks) > 1 else torch.ones(len(each), 1)
        return ((each - each.mean(dim=1, keepdim=True)) / spread.clamp_min(1e-6)).sum(dim=0)

    return score


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text; by default Python's own typing.py.")] = TEXT,
    model: Annotated[
        str, typer.Option(help="A Llama-like model: hub id, folder, GGUF file, or 'demo'.")
    ] = "demo",
    row: Annotated[list[str] | None, typer.Option(help="Only rows whose names begin so; repeatable.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Use the first N tokens.")] = 12288,
    score_from: Annotated[int, typer.Option(help="First token that is scored.")] = 4096,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("out/retrievers.json"),
) -> None:
    """Compare retrievers by perplexity and cost."""
    language_model, tokenizer = load_model(model, dtype=dtype)
    input_ids = tokenize(tokenizer, read_text(text), max_tokens)
    rows = _rows(language_model, tokenizer, input_ids)
    chosen = {name: make for name, make in rows.items() if not row or name.startswith(tuple(row))}
    if not chosen:
        raise InvalidArgumentError(f"--row is {row}, but the rows are {', '.join(rows)}.")
    about = {"model": model, "text": text.name, "tokens": input_ids.shape[1], "score_from": score_from}
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for name, make in chosen.items():
        try:
            results.append(
                {
                    "retriever": name,
                    **_measured(name, make(), language_model, tokenizer, input_ids, score_from),
                }
            )
        except MissingDependencyError as error:
            typer.echo(f"{name}: left out. {error}", err=True)
            continue
        result = {**about, "versions": versions(), "rows": results}
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("retriever", "perplexity", "long-range", "ms a segment", "of the time", box=box.MARKDOWN)
    for each in results:
        table.add_row(
            each["retriever"],
            f"{each['perplexity']:.3f}",
            f"{each['long_range_perplexity'] or float('nan'):.2f}",
            f"{each['ms_per_segment']:.0f}",
            f"{each['share_of_time']:.1%}",
        )
    Console(width=120).print(table)
    typer.echo(f"Written: {out}")


def _measured(
    name: str, retriever: Retriever, model: Any, tokenizer: Any, input_ids: Tensor, score_from: int
) -> dict[str, Any]:
    timed = Timed(retriever)
    with (
        MemoryDecoder(model, tokenizer, MemoryConfig(), retriever=timed) as decoder,
        tqdm(total=input_ids.shape[1], unit="tok", desc=name) as bar,
    ):
        found = evaluate_perplexity(decoder, input_ids, score_from=score_from, progress=bar.update)
        segments = input_ids.shape[1] / decoder.config.segment_size
    return {
        "perplexity": found.perplexity,
        "long_range_perplexity": found.long_range_perplexity,
        "ms_per_segment": 1000 * timed.seconds / segments,
        "share_of_time": timed.seconds / found.seconds,
    }


def _rows(model: Any, tokenizer: Any, input_ids: Tensor) -> dict[str, Callable[[], Retriever]]:
    most = input_ids.shape[1] // MemoryConfig().chunk_size + 1
    states: list[States] = []

    def of_states(make: Callable[[States], Score]) -> Callable[[], Retriever]:
        def made() -> Retriever:
            if not states:
                states.append(States(model, tokenizer, input_ids))
            return Scored(make(states[0]), most)

        return made

    def named(name: str, **options: Any) -> Retriever:
        return create_retriever(name, model, tokenizer, options)

    last = model.config.num_hidden_layers - 1
    middle = last // 2
    return {
        "sentence-transformers": lambda: named("sentence-transformers"),
        "lm": lambda: named("lm"),
        "lm without recency": lambda: named("lm", recency=0),
        "lm, tokens alone": lambda: named("lm", pairs=0, recency=0),
        "random": lambda: named("random"),
        "recent": lambda: named("recent"),
        "BM25": lambda: Scored(bm25, most),
        "token embeddings": lambda: Scored(
            token_vectors(model.get_input_embeddings().weight.detach().float(), input_ids[0]), most
        ),
        "hidden states, middle layer": of_states(lambda made: pooled(made.hidden(middle))),
        "hidden states, last layer": of_states(lambda made: pooled(made.hidden(last))),
        "keys and queries, middle layer": of_states(lambda made: attention(*made.keys_and_queries(middle))),
        "mixed: lm and sentence-transformers": lambda: Scored(
            mixed(embedding(named("lm", recency=0)), embedding(named("sentence-transformers"))), most
        ),
        "mixed: lm and last hidden states": of_states(
            lambda made: mixed(embedding(named("lm", recency=0)), pooled(made.hidden(last)))
        ),
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"retrievers: {error}") from error
