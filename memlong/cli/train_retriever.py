"""``memlong train-retriever``: train a query map that finds the chunks that help the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import escaped, say
from memlong.cli.choice import choose_decoder
from memlong.cli.files import keep_apart, save_or_keep, writable
from memlong.cli.loading import machine_of
from memlong.cli.memory import TRAINED, MemoryOptions, described, with_memory
from memlong.cli.output import JsonOutput
from memlong.cli.passages import passages_of
from memlong.errors import InvalidArgumentError

_MAP = (b"memlong-query-map",)


@with_memory(
    without=("query_map", *TRAINED, "retrieve_every", "retrieve_for", "focus_tokens", "answer_cutoff")
)
def train_retriever(
    ctx: typer.Context,
    *,
    text: Annotated[list[Path], typer.Option(help="UTF-8 text similar to what will be read; repeatable.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write the map to.")],
    model: options.ModelUnlessAdapter = None,
    adapter: options.Adapter = None,
    candidates: Annotated[
        int, typer.Option(min=2, help="Chunks tried for a segment: half the retriever's best, half random.")
    ] = 8,
    rank: Annotated[
        int, typer.Option(min=0, help="Rank of the map; 0 for a factor of each component alone.")
    ] = 8,
    passages: Annotated[int, typer.Option(min=1, help="Passages to read from each text, evenly spaced.")] = 8,
    passage_tokens: Annotated[int, typer.Option(min=2, help="Tokens per passage.")] = 6144,
    memory: MemoryOptions,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
) -> None:
    """Train a query map that finds the chunks that help the model. Only queries are mapped, so memories stay.

    The model reads passages with its memory, and tries some chunks for each segment, each alone. The map is trained to
    make the chunks that helped most the most similar to the query. The last fifth of each passage is held out, and
    decides which epoch is kept, so measure the map on other text. Memory options are those it will be used with.

    \b
    Examples:
      memlong train-retriever --model demo --text books.txt --text code.py --out map.safetensors
      memlong perplexity --model demo --text novel.txt --query-map map.safetensors
      memlong train-retriever --model demo --text books.txt --retriever sentence-transformers --out minilm.safetensors
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    keep_apart({"--out": out, "--json": json_file}, {"--text": text, "--model": [model], **memory.files})
    writable(out, replaces=_MAP, regular=True)
    if memory.typed["backend"] == "none":
        raise InvalidArgumentError(
            "--backend must name a backend, got 'none': without a memory there is nothing to choose from"
        )
    output = JsonOutput(json_file)
    from memlong.evaluation import read_text
    from memlong.training import train_retriever as train
    from memlong.versions import versions

    words = [read_text(file) for file in text]
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
    # An adapter may have a map already.
    decoder = choice.reading_text(query_map=None).open()
    chosen = passages_of(text, words, decoder.tokenizer, passages=passages, passage_tokens=passage_tokens)
    machine = machine_of(decoder.model)
    with (
        decoder,
        tqdm(total=len(chosen) * passage_tokens, unit="tok", desc=f"trying chunks ({machine})") as bar,
    ):
        found = train(decoder, chosen, candidates=candidates, rank=rank, seed=seed, progress=bar.update)
    save_or_keep(found.query_map.save, out, "map was")
    result = {
        "model": model,
        "adapter": adapter,
        **described(decoder),
        "texts": [path.name for path in text],
        "query_map": str(out),
        "rank": rank,
        "candidates": candidates,
        "segments": found.segments,
        "held_out": found.held_out,
        "epochs": found.epochs,
        "share": found.share,
        "base_share": found.base_share,
        "versions": versions(),
    }
    if output.write(result):
        say(
            f"{escaped(str(out))}: of what the best of {candidates} chunks gives over random ones, the most similar "
            f"one gives {found.share:.0%} on {found.held_out:,} held-out segments, which chose the epoch; without "
            f"the map {found.base_share:.0%} ({found.segments:,} segments, {found.epochs} epochs, {machine})"
        )
