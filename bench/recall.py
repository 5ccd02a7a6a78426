"""What a memory recalls: generated facts that are asked for once they have left the local window.

Episodes are those of `memlong train --mix`, with another seed and, best, another text than in training. By default, a
segment asks for one fact, and each fact is asked for once, so that its answer stands nowhere but where it was told. An
answer is right if each of its tokens is the likeliest. A variable may have been given another variable: that is its
answer, and variables of variables are such questions followed to a number, where each answer makes the next question,
and all must be right. Each question is also read with random chunks of the same bank in place of those retrieved, with
the best chunks of other texts, and with none. With `--chunks text`, the model without adapters reads the chunks
retrieved as text before the question.

    python bench/recall.py --text essays.txt --tokens 8192
    python bench/recall.py --text essays.txt --tokens 8192 --adapter trained --name trained --json out/recall.json
    python bench/recall.py --text essays.txt --tokens 65536 --asking 64 --adapter trained
    python bench/recall.py --text essays.txt --tokens 2048 --full --kinds needles
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results import Report
from torch import Tensor
from tqdm import tqdm

from memlong import MemoryBank, MemoryConfig, MemoryDecoder, Segment, load_model
from memlong.decoder import Choice
from memlong.decoder.persistence.pretrained import read_pretrained
from memlong.decoder.stream.retrieval import Retrieval, Search
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import Share, read_text, tokenize
from memlong.training import RandomChunks
from memlong.training.chunks import Chosen, ForeignChunks
from memlong.training.config import RECALL
from memlong.training.documents import Episode
from memlong.training.recall import RecallEpisodes, tokenize_asked
from memlong.training.teacher import Lesson

_ASSIGNED = re.compile(r"VAR (\w+) = (VAR )?(\w+)")
_ASKED = re.compile(r"The value of (\w+) is")
CONTROLS = ("random", "foreign", "none", "text")


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
    held
        Share of the questions for which a chunk holds the end of the fact; None where that is not known.
    """

    kind: str
    chunks: str
    tokens: int
    answers: Share
    loss: float
    held: Share | None


@dataclass(frozen=True, eq=False)
class Judged:
    """An answer.

    Attributes
    ----------
    kind, chunks
        What was asked, with which chunks.
    right
        Whether each token of it is the likeliest.
    losses
        The negative log-likelihood of each token, in nats.
    held
        Whether a chunk holds the end of the fact; None if that is not known.
    """

    kind: str
    chunks: str
    right: bool
    losses: Tensor
    held: bool | None = None


class RetrieveFor(StrEnum):
    """Which segments retrieve."""

    ALL = "all"
    ANSWERS = "answers"


class NoChunks(Choice):
    """Retrieves nothing."""

    def choose(self, search: Search) -> Chosen | None:
        """Return no chunk of the bank."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return Retrieval(search.query, nothing, nothing.float()), search.bank.fetch([])


def main(
    text: Annotated[list[Path], typer.Option(help="File to hide facts in; repeatable.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    adapter: Annotated[Path | None, typer.Option(help="A trained decoder, in place of a model.")] = None,
    kv_source: Annotated[str | None, typer.Option(help="'layer', 'shared' or 'latent'.")] = None,
    maps: Annotated[str | None, typer.Option(help="Maps of 'latent'.")] = None,
    memory_layer: Annotated[int | None, typer.Option(help="Memory layer of 'shared'.")] = None,
    retrieval_layers: Annotated[str | None, typer.Option(help="Retrieval layers.")] = None,
    retriever: Annotated[str | None, typer.Option(help="A retriever in place of the usual one.")] = None,
    retriever_dim: Annotated[int | None, typer.Option(help="Width of the sketches of 'lm'.")] = None,
    kinds: Annotated[str, typer.Option(help=f"Of {', '.join(RECALL)}.")] = "dictionary,needles,variables",
    chunks: Annotated[str, typer.Option(help=f"Controls: of {', '.join(CONTROLS)}.")] = "random,foreign,none",
    full: Annotated[
        bool, typer.Option("--full", help="The model's full attention in place of a memory.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of an episode.")] = 8192,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of each kind.")] = 2,
    questions: Annotated[int, typer.Option(min=1, help="Most questions in a segment.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Ask for a fact more than once.")] = False,
    asking: Annotated[int | None, typer.Option(min=1, help="Only so many last segments ask.")] = None,
    retrieve_for: Annotated[
        RetrieveFor, typer.Option(help="'all' segments, or 'answers': those with questions alone.")
    ] = RetrieveFor.ANSWERS,
    local_window: Annotated[int | None, typer.Option(help="Local window.")] = None,
    segment_size: Annotated[int | None, typer.Option(help="Tokens between retrievals.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Chunks retrieved.")] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'auto'.")] = "float32",
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Random seed; not that of the training.")] = 1000,
    name: Annotated[str, typer.Option(help="Name of what is measured, in the result file.")] = "memory",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file, beside what it holds.")
    ] = None,
) -> None:
    """Measure recall, kind by kind."""
    wanted, asked = chunks.split(",") if chunks else [], kinds.split(",")
    if odd := [each for each in wanted if each not in CONTROLS]:
        raise InvalidArgumentError(f"--chunks must be some of {', '.join(CONTROLS)}, got {odd[0]!r}")
    named = {
        "kv_source": kv_source,
        "maps": maps,
        "memory_layer": memory_layer,
        "retrieval_layers": retrieval_layers,
        "local_window": local_window,
        "segment_size": segment_size,
        "top_k": top_k,
        "retriever": retriever,
        "retrieve_for": retrieve_for.value,
    }
    given: dict[str, Any] = {each: value for each, value in named.items() if value is not None}
    if retriever_dim is not None:
        given["retriever_options"] = {"dim": retriever_dim}
    if adapter is not None:  # which refuses what the training has decided
        decoder = MemoryDecoder.from_pretrained(adapter, dtype=dtype, device=device, changes=given)
        model = read_pretrained(adapter).base_model or model
    else:
        decoder = MemoryDecoder(*load_model(model, dtype=dtype, device=device), MemoryConfig(**given))
    config = decoder.config
    if tokens % config.segment_size:  # what is asked for besides must begin a segment, to retrieve
        raise InvalidArgumentError(
            f"--tokens must be a multiple of {config.segment_size}, the size of segments, got {tokens}"
        )
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
            questions=questions,
            again=again,
            asked_from=0 if asking is None else max(0, tokens - asking * config.segment_size),
        )
        for kind in asked
    }
    others = json.loads(json_file.read_text("utf-8")) if json_file is not None and json_file.exists() else {}
    systems = others.get("systems", {})
    files = ("maps", "gates", "null_chunk", "query_map")
    memory = {each: value for each, value in config.as_dict().items() if each not in files}
    report = Report(json_file, {"model": model, "systems": systems}, device)
    found: dict[tuple[str, str], list[Judged]] = {}
    with tqdm(total=episodes * tokens * len(asked), unit="tok", leave=False) as bar:
        for number in range(episodes):
            group = {kind: source[number] for kind, source in sources.items()}
            read = _by_full_attention(decoder, group) if full else _answers(decoder, group, wanted, bar)
            for each in read:
                found.setdefault((each.kind, each.chunks), []).append(each)
    rows = []
    for (kind, which), judged in sorted(found.items()):
        share = Share.of([each.right for each in judged])
        assert share is not None  # noqa: S101 - every episode asks
        loss = float(torch.cat([each.losses for each in judged]).mean())
        held = Share.of([each.held for each in judged if each.held is not None])
        rows.append(Recalled(kind, which, tokens, share, loss, held))
        hit = f", {held.value:.0%} of the facts in its chunks" if held else ""
        typer.echo(f"{kind:12s} {which:15s} {share} of {share.trials} answers, loss {loss:.3f}{hit}")
    asks = {
        "text": [path.name for path in text],
        "seed": seed,
        "episodes": episodes,
        "questions": questions,
        "again": again,
        "asking": asking,
    }
    systems[f"{name}, {tokens}"] = {"memory": memory, **asks, "rows": [asdict(row) for row in rows]}
    report.add({"systems": systems})
    report.end()


def _answers(
    decoder: MemoryDecoder,
    group: Mapping[str, Episode],
    controls: Sequence[str],
    bar: tqdm[None],
) -> Iterator[Judged]:
    """Read episodes side by side, each of which is foreign to the others, and judge each answer."""
    choices: dict[str, Choice] = {
        "random": RandomChunks(1.0, torch.Generator().manual_seed(0)),
        "foreign": ForeignChunks(),
        "none": NoChunks(),
    }
    ids, size = torch.stack([episode.tokens for episode in group.values()]), decoder.config.segment_size
    with decoder, torch.no_grad():
        decoder.reset()
        for start in range(0, ids.shape[1], size):
            new = ids[:, start : start + size]
            queries = [episode.queries.get(start) for episode in group.values()]
            following = slice(start + 1, start + size + 1)
            read = {}
            if any(episode.weights[following].any() for episode in group.values()):
                for control in (each for each in controls if each in choices):
                    read[control] = decoder.preview(new, queries=queries, choice=choices[control])
            if decoder.config.retrieve_for == "answers":
                # As generate() answers: in forks. The text itself is read without memory.
                read["retrieved"] = decoder.preview(new, queries=queries)
                decoder.read(new)
            else:
                (read["retrieved"],) = decoder.stream(new, queries=queries)
            if "text" in controls:
                read["text"] = read["retrieved"]
            for (which, segment), (row, (kind, episode)) in product(read.items(), enumerate(group.items())):
                reading = Reading(decoder, episode, which, choices.get(which), row, len(group))
                found = [
                    *reading.judged(
                        segment, episode.tokens[start : start + size + 1], episode.weights[following]
                    )
                ]
                places = episode.told.get(start, ()) if which in ("retrieved", "random") else ()
                held = [_holds(decoder.banks[row], segment.retrievals[row], place) for place in places]
                unknown = [None] * len(found)
                for (right, losses), here in zip(found, held or unknown, strict=False):
                    yield Judged(kind, which, right, losses, here)
                if kind == "variables":
                    followed = reading.followed(start, found)
                    yield from (Judged("variables of variables", which, *each) for each in followed)
            bar.update(new.numel())


def _holds(bank: MemoryBank, retrieval: Retrieval | None, place: int) -> bool:
    """Whether what was retrieved holds the token before this one."""
    spans = bank.spans_of([] if retrieval is None else retrieval.ids.tolist())
    return bool(((spans[:, 0] < place) & (place <= spans[:, 1])).any())


@dataclass(frozen=True)
class Reading:
    """How a row reads what it asks for, after what it has read so far.

    Attributes
    ----------
    decoder, episode, row, rows
        What is read, in which of how many rows.
    chunks, choice
        Which chunks, and what chooses them in place of the retriever.
    """

    decoder: MemoryDecoder
    episode: Episode
    chunks: str
    choice: Choice | None
    row: int
    rows: int

    def judged(self, segment: Segment, ids: Tensor, weights: Tensor) -> Iterator[tuple[bool, Tensor]]:
        """Judge the answers among token ids [tokens], of which ``weights`` say what counts from the second on."""
        if self.chunks == "text":
            return self._as_text(segment.retrievals[self.row], ids, weights)
        assert segment.logits is not None  # noqa: S101 - they were asked for
        return _judged(segment.logits[self.row], ids[1:], weights)

    def followed(self, start: int, found: Sequence[tuple[bool, Tensor]]) -> Iterator[tuple[bool, Tensor]]:
        """Follow the answers of a segment that name another variable: each is right if all that follows is, too.

        Each question that follows is asked alone, as the beginning of the next segment, after a window that was read
        with the chunks retrieved. Chains of which one was asked before are left out, as its answer stands twice.
        """
        tokenizer = self.decoder.tokenizer
        told = tokenizer.decode(self.episode.tokens[:start])
        known = {name: (value, bool(other)) for name, other, value in _ASSIGNED.findall(told)}
        names = _ASKED.findall(tokenizer.decode(self.episode.queries.get(start, [])))
        for name, first in zip(names, found, strict=True):
            chain, judged = [], [first]
            value, is_other = known[name]
            while is_other:
                chain.append(value)
                value, is_other = known[value]
            if not chain or set(chain) & {*_ASKED.findall(told)}:
                continue
            for other in chain:
                value, is_other = known[other]
                answer = f"VAR {value}" if is_other else value
                judged += self._asked(*tokenize_asked(tokenizer, f"The value of {other} is", answer))
            rights, losses = zip(*judged, strict=True)
            yield all(rights), torch.cat(losses)

    def _asked(self, question: list[int], answer: list[int]) -> Iterator[tuple[bool, Tensor]]:
        new = torch.tensor([*question, *answer])
        queries = [question] * self.rows
        segment = self.decoder.preview(new.expand(self.rows, -1), queries=queries, choice=self.choice)
        weights = torch.tensor([0.0] * (len(question) - 1) + [1.0] * len(answer))
        return self.judged(segment, new, weights)

    def _as_text(
        self, retrieval: Retrieval | None, ids: Tensor, weights: Tensor
    ) -> Iterator[tuple[bool, Tensor]]:
        if not weights.any():
            return
        bank = self.decoder.banks[self.row]
        spans = sorted(bank.spans_of([] if retrieval is None else retrieval.ids.tolist()).tolist())
        # Not chunks that leave the window only now, which no bank holds yet: they were not told long ago.
        chunks = [self.episode.tokens[start:end] for start, end in spans if start >= 0]
        sinks = self.episode.tokens[: self.decoder.config.sink_tokens]
        lesson = Lesson.of(self.decoder, torch.cat([sinks, *chunks, ids])[None])
        before = -len(ids)
        right = lesson.ids[0, before:-1, 0].cpu() == ids[1:]
        yield from _of_answers(right, lesson.losses[0, before:-1].cpu(), weights)


def _by_full_attention(decoder: MemoryDecoder, group: Mapping[str, Episode]) -> Iterator[Judged]:
    ids = torch.stack([episode.tokens for episode in group.values()])
    lesson = Lesson.of(decoder, ids)
    size = decoder.config.segment_size
    for row, (kind, episode) in enumerate(group.items()):
        right = lesson.ids[row, :-1, 0].cpu() == episode.tokens[1:]
        losses = lesson.losses[row, :-1].cpu()
        for start in range(0, len(episode.tokens), size):
            here, following = slice(start, start + size), slice(start + 1, start + size + 1)
            judged = _of_answers(right[here], losses[here], episode.weights[following])
            yield from (Judged(kind, "full attention", *each) for each in judged)


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
