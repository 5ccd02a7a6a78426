"""What a memory recalls: generated facts that are asked for once they have left the local window.

Episodes are those of `memlong train --mix`, with another seed and, best, another text than in training. An answer is
right if each of its tokens is the likeliest. Every memory is also read with random chunks of its own bank in place of
those retrieved, with the best chunks of another text, and without memory.

    python bench/recall.py --text essays.txt --tokens 8192
    python bench/recall.py --text essays.txt --tokens 8192 --adapter trained --name trained --json out/recall.json
    python bench/recall.py --text essays.txt --tokens 2048 --full --kinds needles
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from results import Report
from torch import Tensor
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.decoder import Choice
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import Share, read_text, tokenize
from memlong.training import RandomChunks
from memlong.training.chunks import ForeignChunks
from memlong.training.config import RECALL
from memlong.training.documents import Episode
from memlong.training.recall import RecallEpisodes
from memlong.training.teacher import Lesson

CHUNKS = ("retrieved", "random", "foreign")
ROWS = 2  # episodes side by side, each of which is foreign to the other


@dataclass(frozen=True)
class Recalled:
    """What was recalled of one kind, with one kind of chunks.

    Attributes
    ----------
    kind, chunks, tokens
        What was asked, with which chunks, in episodes of how many tokens.
    answers
        Share of the answers that were right.
    loss
        Mean negative log-likelihood of the answers' tokens, in nats.
    """

    kind: str
    chunks: str
    tokens: int
    answers: Share
    loss: float


def main(
    text: Annotated[list[Path], typer.Option(help="File to hide facts in; repeatable.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    adapter: Annotated[Path | None, typer.Option(help="A trained decoder, in place of a model.")] = None,
    kv_source: Annotated[str, typer.Option(help="'layer', 'shared' or 'latent'.")] = "layer",
    maps: Annotated[Path | None, typer.Option(help="Maps of 'latent'.")] = None,
    memory_layer: Annotated[int | None, typer.Option(help="Memory layer of 'shared'.")] = None,
    retrieval_layers: Annotated[str, typer.Option(help="Retrieval layers.")] = "all",
    kinds: Annotated[str, typer.Option(help=f"Of {', '.join(RECALL)}.")] = "dictionary,needles,variables",
    chunks: Annotated[
        str, typer.Option(help=f"Of {', '.join((*CHUNKS, 'none'))}.")
    ] = "retrieved,random,foreign,none",
    full: Annotated[
        bool, typer.Option("--full", help="The model's full attention in place of a memory.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of an episode.")] = 8192,
    episodes: Annotated[int, typer.Option(min=1, help=f"Groups of {ROWS} episodes of each kind.")] = 1,
    local_window: Annotated[int, typer.Option(help="Local window.")] = 1024,
    segment_size: Annotated[int, typer.Option(help="Tokens between retrievals.")] = 256,
    top_k: Annotated[int, typer.Option(help="Chunks retrieved.")] = 8,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'auto'.")] = "float32",
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Random seed; not that of the training.")] = 1000,
    name: Annotated[str, typer.Option(help="Name of what is measured, in the result file.")] = "memory",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file, beside what it holds.")
    ] = None,
) -> None:
    """Measure recall, kind by kind."""
    wanted, asked = chunks.split(","), kinds.split(",")
    if odd := [each for each in wanted if each not in (*CHUNKS, "none")]:
        raise InvalidArgumentError(f"--chunks must be some of {', '.join((*CHUNKS, 'none'))}, got {odd[0]!r}")
    decoder = _decoder(
        model,
        adapter,
        dtype,
        device,
        kv_source,
        maps,
        memory_layer,
        retrieval_layers,
        local_window,
        segment_size,
        top_k,
    )
    config = decoder.config
    filler = [tokenize(decoder.tokenizer, read_text(path))[0] for path in text]
    sources = {
        kind: RecallEpisodes(
            kind,
            decoder.tokenizer,
            filler,
            tokens=tokens,
            segment_size=config.segment_size,
            local_window=config.local_window,
            seed=seed,
        )
        for kind in asked
    }
    others = json.loads(json_file.read_text("utf-8")) if json_file is not None and json_file.exists() else {}
    systems = others.get("systems", {})
    memory = {each: value for each, value in config.as_dict().items() if each not in ("maps", "gates")}
    report = Report(json_file, {"model": model, "systems": systems}, device)
    rows: list[Recalled] = []
    for kind, source in sources.items():
        for which in ["full attention"] if full else wanted:
            bar = tqdm(total=episodes * tokens, unit="tok", desc=f"{kind}, {which}", leave=False)
            found: list[tuple[bool, Tensor]] = []
            with bar:
                for number in range(episodes):
                    group = [source[ROWS * number + row] for row in range(ROWS)]
                    found += (
                        _by_full_attention(decoder, group) if full else _answers(decoder, group, which, bar)
                    )
            losses = torch.cat([each for _, each in found])
            share = Share.of([right for right, _ in found])
            assert share is not None  # noqa: S101 - every episode asks
            rows.append(Recalled(kind, which, tokens, share, float(losses.mean())))
            typer.echo(f"{kind:12s} {which:15s} {share} of {share.trials} answers, loss {rows[-1].loss:.3f}")
            systems[f"{name}, {tokens}"] = {"memory": memory, "rows": [asdict(row) for row in rows]}
            report.add({"systems": systems})
    report.end()


def _decoder(
    model: str,
    adapter: Path | None,
    dtype: str,
    device: str,
    kv_source: str,
    maps: Path | None,
    memory_layer: int | None,
    retrieval_layers: str,
    local_window: int,
    segment_size: int,
    top_k: int,
) -> MemoryDecoder:
    if adapter is not None:
        return MemoryDecoder.from_pretrained(adapter, dtype=dtype, device=device)
    config = MemoryConfig(
        kv_source=kv_source,
        maps=None if maps is None else str(maps),
        memory_layer=memory_layer,
        retrieval_layers=retrieval_layers,
        local_window=local_window,
        segment_size=segment_size,
        top_k=top_k,
    )
    return MemoryDecoder(*load_model(model, dtype=dtype, device=device), config)


def _answers(
    decoder: MemoryDecoder, group: Sequence[Episode], chunks: str, bar: tqdm[None]
) -> Iterator[tuple[bool, Tensor]]:
    """Yield for each answer of some episodes whether it is right, and its tokens' losses."""
    plain = MemoryDecoder(decoder.model, decoder.tokenizer, replace(decoder.config, backend=None))
    reader = plain if chunks == "none" else decoder
    choice: dict[str, Choice] = {
        "random": RandomChunks(1.0, torch.Generator().manual_seed(0)),
        "foreign": ForeignChunks(lambda: reader.banks),
    }
    ids, size = torch.stack([episode.tokens for episode in group]), decoder.config.segment_size
    with reader, torch.no_grad():
        reader.reset(choice=choice.get(chunks))
        for start in range(0, ids.shape[1], size):
            queries = [episode.queries.get(start) for episode in group]
            (segment,) = reader.stream(ids[:, start : start + size], queries=queries)
            for row, episode in enumerate(group):
                following = slice(start + 1, start + size + 1)
                yield from _judged(segment.logits[row], episode.tokens[following], episode.weights[following])
            bar.update(size)


def _by_full_attention(decoder: MemoryDecoder, group: Sequence[Episode]) -> Iterator[tuple[bool, Tensor]]:
    ids = torch.stack([episode.tokens for episode in group])
    lesson = Lesson.of(decoder.model, ids, decoder.model.device)
    for row, episode in enumerate(group):
        following = slice(1, None)
        right = lesson.ids[row, :-1, 0].cpu() == episode.tokens[following]
        yield from _of_answers(right, lesson.losses[row, :-1].cpu(), episode.weights[following])


def _judged(logits: Tensor, targets: Tensor, weights: Tensor) -> Iterator[tuple[bool, Tensor]]:
    logits = logits[: len(targets)].float().cpu()
    losses = -logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    yield from _of_answers(logits.argmax(dim=-1) == targets, losses, weights)


def _of_answers(right: Tensor, losses: Tensor, weights: Tensor) -> Iterator[tuple[bool, Tensor]]:
    """Cut tokens into answers: stretches that count."""
    marks = torch.nn.functional.pad((weights > 0).int(), (1, 1)).diff()
    for start, end in zip(
        (marks > 0).nonzero()[:, 0].tolist(), (marks < 0).nonzero()[:, 0].tolist(), strict=True
    ):
        yield bool(right[start:end].all()), losses[start:end]


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"bench: {error}") from error
