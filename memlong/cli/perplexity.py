"""``memlong perplexity``: measure the perplexity of a text, with memory or with the plain window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import escaped
from memlong.cli.choice import choose_decoder
from memlong.cli.files import keep_apart
from memlong.cli.loading import machine_of
from memlong.cli.memory import TRAINED, MemoryOptions, described, with_memory
from memlong.cli.output import JsonOutput, print_table

if TYPE_CHECKING:
    from memlong.decoder import MemoryDecoder
    from memlong.evaluation import Perplexity


@with_memory(without=(*TRAINED, "retrieve_every", "retrieve_for", "focus_tokens", "answer_cutoff"))
def perplexity(
    ctx: typer.Context,
    *,
    text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    model: options.ModelUnlessAdapter = None,
    adapter: options.Adapter = None,
    memory: MemoryOptions,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Use only the first N tokens.")] = None,
    score_from: Annotated[int, typer.Option(min=1, help="Index of the first scored token.")] = 1,
    long_range_distance: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that last occurred farther back count as long-range  [default: local window]"
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
) -> None:
    """Stream a text through a model and report its perplexity.

    The local window includes the current segment. Tokens before --score-from are read but not scored, so that systems
    can be compared on identical tokens.

    \b
    Examples:
      memlong perplexity --model demo --text book.txt --max-tokens 24576 --score-from 8192
      memlong perplexity --model demo --text book.txt --backend none --local-window 2048
      memlong perplexity --model demo --text book.txt --backend faiss --backend-option index=HNSW32
      memlong perplexity --model HuggingFaceTB/SmolLM2-360M --text book.txt --retriever lm --json out.json
      memlong perplexity --adapter trained --text book.txt
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    keep_apart({"--json": json_file}, {"--text": [text], **memory.files, "--model": [model]})
    output = JsonOutput(json_file)
    # Importing torch and transformers takes seconds, so only here.
    from memlong.evaluation import evaluate_perplexity, read_text, tokenize

    words = read_text(text)
    choice = choose_decoder(
        ctx,
        model,
        adapter,
        memory,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    decoder = choice.reading_text().open()
    input_ids = tokenize(decoder.tokenizer, words, max_tokens)
    with (
        decoder,
        tqdm(
            total=input_ids.shape[1], unit="tok", desc=f"{escaped(text.name)} ({machine_of(decoder.model)})"
        ) as bar,
    ):
        result = evaluate_perplexity(
            decoder,
            input_ids,
            score_from=score_from,
            long_range_distance=long_range_distance,
            progress=bar.update,
        )
    summary = _summary(decoder, result, model=model, adapter=adapter, text=str(text), seed=seed)
    distance = decoder.config.local_window if long_range_distance is None else long_range_distance
    summary |= {"score_from": score_from, "long_range_distance": distance}
    if output.write(summary):
        _print(summary)


def _summary(decoder: MemoryDecoder, result: Perplexity, **given: object) -> dict[str, Any]:
    from memlong.evaluation.environment import peak_rss_bytes
    from memlong.versions import versions

    return {
        **given,
        **described(decoder),
        "tokens": result.tokens,
        "scored_tokens": int(result.token_nll.size),
        "nll": result.nll,
        "perplexity": result.perplexity,
        "long_range": {"tokens": int(result.long_range.sum()), "perplexity": result.long_range_perplexity},
        "chunks_stored": result.chunks_stored,
        "recall_at_k": result.recall_at_k,
        "recall_k": decoder.retrieved_chunks if decoder.config.backend else None,
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
            else "no long-range tokens",
        ),
        ("backend", f"{summary['backend']}, {summary['chunks_stored']:,} chunks stored"),
    ]
    if summary["recall_at_k"] is not None:
        rows.append((f"recall@{summary['recall_k']}", f"{summary['recall_at_k']:.4f}"))
    rows.append(("device", f"{summary['device']}, {summary['dtype']}"))
    rows.append(("speed", f"{summary['tokens_per_second']:.0f} tokens/s, {summary['seconds']:.1f} s"))
    if summary["peak_rss_bytes"] is not None:
        rows.append(("peak memory", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB"))
    print_table(("", ""), rows)
