"""``memlong perplexity``: perplexity of a text, with a memory or over the plain window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from memlong.cli.output import print_table
from memlong.cli.values import key_values, writable
from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    from memlong.decoder import MemoryDecoder
    from memlong.evaluation import Perplexity


def perplexity(
    model: Annotated[
        str, typer.Option(help="Hub id, folder, GGUF file, or 'demo' (SmolLM2-135M-Instruct from pip).")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    backend: Annotated[str, typer.Option(help="Memory backend, or 'none' for the plain window.")] = "torch",
    backend_option: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Option of the backend; may be repeated.")
    ] = None,
    retriever: Annotated[
        str, typer.Option(help="Retriever by name, or a sentence-transformers hub id or folder.")
    ] = "sentence-transformers",
    retriever_option: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Option of the retriever; may be repeated.")
    ] = None,
    kv_source: Annotated[
        str, typer.Option(help="'layer': each layer stores and reads its own K-V.")
    ] = "layer",
    retrieval_layers: Annotated[str, typer.Option(help="'all', or such as '15-29' or '3,7,11'.")] = "all",
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 128,
    top_k: Annotated[int, typer.Option(help="Chunks retrieved for a segment.")] = 8,
    local_window: Annotated[int, typer.Option(help="Local tokens attended to, the segment included.")] = 1024,
    sink_tokens: Annotated[int, typer.Option(help="First tokens kept in every layer.")] = 4,
    segment_size: Annotated[int, typer.Option(help="Tokens of a forward call.")] = 256,
    query_tokens: Annotated[
        int | None, typer.Option(help="Tokens before a segment that make its query  [default: segment size]")
    ] = None,
    position_mode: Annotated[str, typer.Option(help="'zero', 'before-window' or 'original'.")] = "zero",
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first N tokens.")] = None,
    score_from: Annotated[int, typer.Option(help="First token that is scored.")] = 1,
    long_range_distance: Annotated[
        int | None, typer.Option(help="A token last met farther back is long-range  [default: local window]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'cuda:N'.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed, for random retrieval.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; '-' prints it.")
    ] = None,
) -> None:
    """Stream a text through a model and report its perplexity.

    The window counts the segment itself. Tokens before --score-from are read and not scored, so systems can be
    compared on identical tokens.

    \b
    Examples:
      memlong perplexity --model demo --text book.txt --max-tokens 24576 --score-from 8192
      memlong perplexity --model demo --text book.txt --backend none --local-window 2048
      memlong perplexity --model demo --text book.txt --backend faiss --backend-option index=HNSW32
      memlong perplexity --model HuggingFaceTB/SmolLM2-360M --text book.txt --retriever lm --json out.json
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    to_stdout = json_file == Path("-")
    if json_file is not None and not to_stdout:
        writable(json_file)
    # Torch and transformers take seconds to import: only here, where they are needed.
    from memlong.decoder import MemoryConfig, MemoryDecoder, load_model
    from memlong.evaluation import evaluate_perplexity, read_text, tokenize

    if backend == "none" and backend_option:
        raise InvalidArgumentError("--backend-option goes with a backend, and --backend is 'none'")
    words = read_text(text)
    retriever_options = key_values("--retriever-option", retriever_option or [])
    if retriever == "random":
        retriever_options.setdefault("seed", seed)
    config = MemoryConfig(
        backend=None if backend == "none" else backend,
        backend_options=key_values("--backend-option", backend_option or []),
        retriever=retriever,
        retriever_options=retriever_options,
        kv_source=kv_source,  # type: ignore[arg-type] # checked by the configuration
        retrieval_layers=retrieval_layers,
        chunk_size=chunk_size,
        top_k=top_k,
        local_window=local_window,
        sink_tokens=sink_tokens,
        segment_size=segment_size,
        query_tokens=query_tokens,
        position_mode=position_mode,  # type: ignore[arg-type]
    )
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    input_ids = tokenize(tokenizer, words, max_tokens)
    with (
        MemoryDecoder(language_model, tokenizer, config) as decoder,
        tqdm(total=input_ids.shape[1], unit="tok", desc=text.name) as bar,
    ):
        result = evaluate_perplexity(
            decoder,
            input_ids,
            score_from=score_from,
            long_range_distance=long_range_distance,
            progress=bar.update,
        )
    summary = _summary(decoder, result, model=model, text=str(text), dtype=dtype, device=device, seed=seed)
    distance = local_window if long_range_distance is None else long_range_distance
    summary |= {"score_from": score_from, "long_range_distance": distance}
    if to_stdout:
        typer.echo(json.dumps(summary, indent=2))
        return
    if json_file is not None:
        json_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print(summary)


def _summary(decoder: MemoryDecoder, result: Perplexity, **given: object) -> dict[str, Any]:
    from memlong.evaluation.environment import peak_rss_bytes, versions

    config = decoder.config
    remembers = config.backend is not None
    return {
        **given,
        "backend": config.backend or "none",
        "backend_options": dict(config.backend_options),
        "retriever": config.retriever if remembers else None,
        "retriever_options": dict(config.retriever_options) if remembers else {},
        "kv_source": config.kv_source if remembers else None,
        "retrieval_layers": list(decoder.retrieval_layers) if remembers else [],
        "position_mode": config.position_mode,
        "chunk_size": config.chunk_size,
        "top_k": config.top_k,
        "local_window": config.local_window,
        "sink_tokens": config.sink_tokens,
        "segment_size": config.segment_size,
        "query_tokens": config.query_length,
        "tokens": result.tokens,
        "scored_tokens": int(result.token_nll.size),
        "nll": result.nll,
        "perplexity": result.perplexity,
        "long_range": {"tokens": int(result.long_range.sum()), "perplexity": result.long_range_perplexity},
        "chunks_stored": result.chunks_stored,
        "recall_at_k": result.recall_at_k,
        "tokens_per_second": result.tokens / result.seconds,
        "seconds": result.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": versions(),
    }


def _print(summary: dict[str, Any]) -> None:
    distant = summary["long_range"]
    rows = [
        ("perplexity", f"{summary['perplexity']:.3f} over {summary['scored_tokens']:,} tokens"),
        (
            "long-range",
            f"{distant['perplexity']:.3f} over {distant['tokens']:,} tokens"
            if distant["tokens"]
            else "no such token",
        ),
        ("backend", f"{summary['backend']}, {summary['chunks_stored']:,} chunks stored"),
    ]
    if summary["recall_at_k"] is not None:
        rows.append((f"recall@{summary['top_k']}", f"{summary['recall_at_k']:.4f}"))
    rows.append(("speed", f"{summary['tokens_per_second']:.0f} tokens/s, {summary['seconds']:.1f} s"))
    if summary["peak_rss_bytes"] is not None:
        rows.append(("peak memory", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB"))
    print_table(("", ""), rows)
