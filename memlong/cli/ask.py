"""``memlong ask``: put questions to corpora, each alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlong.cli import options
from memlong.cli.answer import escaped, say
from memlong.cli.corpora import (
    MemoryFolders,
    choose_reader,
    layered,
    load_corpora,
    moment,
    needed_notes,
    open_ids,
)
from memlong.cli.files import keep_apart
from memlong.cli.memory import TRAINED, MemoryOptions, described, with_memory
from memlong.cli.output import JsonOutput, print_section
from memlong.cli.question import question_of
from memlong.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from memlong.bank import LayeredBank
    from memlong.corpus import Corpus
    from memlong.decoder import MemoryDecoder, Source

_SHOWN = 100  # characters of a chunk


@with_memory(without=TRAINED)
def ask(
    ctx: typer.Context,
    *,
    memory_folders: MemoryFolders,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Question, or text to continue; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text file with a prompt on each line.")
    ] = None,
    model: options.ModelUnlessMemory = None,
    adapter: options.Adapter = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens to generate for each prompt.")
    ] = 200,
    chat: Annotated[bool, typer.Option(help="Apply the model's chat template to each prompt.")] = False,
    tag: Annotated[
        list[str] | None, typer.Option(help="Find only documents with this tag; repeatable, for all of them.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Find only documents from this ISO date on.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="Find only documents from before this ISO date.")
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(
            help="Find only this document, as memlong remember names it; repeatable, for any of them."
        ),
    ] = None,
    sources: Annotated[
        bool,
        typer.Option("--sources", help="List below each answer what it attended to, and how much."),
    ] = False,
    memory: MemoryOptions,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
) -> None:
    """Answer prompts with the documents of corpora in memory, each prompt alone.

    Nothing is read again but the prompts, and the corpora do not change. Keys and values stay on disk until they are
    needed.

    \b
    Examples:
      memlong ask --memory manual --prompt "How is the pump started?" --chat
      memlong ask --memory manual --memory notes --prompt "What is due?" --tag work --since 2026-01-31
      memlong ask --memory manual --prompts questions.txt --chat --sources
      memlong ask --memory manual --prompt "The pump" --document manual.txt --json -
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    keep_apart({"--json": json_file}, {"--prompts": [prompts], **memory.files, "--model": [model]})
    output = JsonOutput(json_file)
    questions = _questions(prompt or [], prompts)
    times = {"since": moment("--since", since), "until": moment("--until", until)}
    notes = needed_notes(memory_folders)
    decoder = choose_reader(
        ctx,
        notes,
        model,
        adapter,
        memory,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    ).open()
    from memlong.decoder import text_streamer

    corpora = load_corpora(memory_folders, decoder)
    among = open_ids(corpora, tags=tag or (), sources=document or (), **times)
    bank = layered(decoder, corpora, among)
    decoder.reset([bank])
    answers = []
    with decoder:
        for number, words in enumerate(questions):
            if not output.is_stdout and len(questions) > 1:
                say(("\n" if number else "") + escaped(f"> {words}"))
            streamer = (
                None if output.is_stdout else text_streamer(decoder.tokenizer, lambda text: say(text, end=""))
            )
            with decoder.sources() if sources or json_file else nullcontext() as recorded:
                answered = _answer(decoder, words, streamer, chat=chat, max_new_tokens=max_new_tokens)
            found = [
                _told(decoder.tokenizer, corpora, memory_folders, bank, each)
                for each in (recorded.chunks if recorded else ())
                if each.id is not None
            ]
            answers.append({**answered, "sources": found})
            if not output.is_stdout and sources:
                print_section("Sources", [_shown(each) for each in found])
    output.write(
        {
            "model": model or notes.model,
            "adapter": adapter,
            "memory": [str(each) for each in memory_folders],
            **described(decoder),
            "answers": answers,
        }
    )


class _Clock:
    """Notes when the first token of an answer is known; a logits processor."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, _input_ids: Tensor, logits: Tensor) -> Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        return logits


def _questions(typed: Sequence[str], file: Path | None) -> list[str]:
    from memlong.evaluation import read_text
    from memlong.evaluation.text import check_characters

    if bool(typed) == (file is not None):
        raise InvalidArgumentError(
            "Give prompts either with --prompt, or one a line in a file with --prompts"
        )
    if file is not None:
        return [line for line in read_text(file).splitlines() if line.strip()]
    for words in typed:
        if not words:
            raise InvalidArgumentError("--prompt must not be empty: give at least one word to continue")
        check_characters("--prompt", words)
    return list(typed)


def _answer(
    decoder: MemoryDecoder, words: str, streamer: Any, *, chat: bool, max_new_tokens: int
) -> dict[str, Any]:
    import torch

    from memlong.evaluation.numbers import checked_logits

    question = question_of(decoder.tokenizer, words, chat=chat, begins=True)
    clock, started = _Clock(), time.perf_counter()
    sequences = decoder.generate(
        question,
        torch.ones_like(question),
        remember=False,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        logits_processor=[checked_logits, clock],
        streamer=streamer,
    )
    ended, first = time.perf_counter(), clock.first or started
    new = sequences[0, question.shape[1] :]
    return {
        "prompt": words,
        "answer": decoder.tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": question.shape[1],
        "new_tokens": len(new),
        "seconds_to_first_token": first - started,
        "seconds_per_token": (ended - first) / (len(new) - 1) if len(new) > 1 else None,
    }


def _told(
    tokenizer: Any, corpora: Sequence[Corpus], folders: Sequence[Path], bank: LayeredBank, found: Source
) -> dict[str, Any]:
    """Describe a chunk that an answer attended to."""
    layer, chunk = int(bank.layer_of([found.id])), int(bank.own_ids([found.id]))
    corpus = corpora[layer]
    told: dict[str, Any] = {"memory": str(folders[layer]), "chunk": chunk, "attention": found.mass}
    document = corpus.document_of(chunk)
    if document is None:
        return told
    first, last = document.span_in_text(*found.span)
    words = tokenizer.decode(corpus.tokens_of(document.source)[first:last], skip_special_tokens=True)
    return {
        **told,
        "source": document.source,
        "title": document.title,
        "first_token": first,
        "end_token": last,
        "text": " ".join(words.split()),
    }


def _shown(told: dict[str, Any]) -> str:
    share = f"{told['attention']:.1%}"
    if "source" not in told:
        return f"{share} chunk {told['chunk']} of {told['memory']}"
    text = told["text"]
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN].rstrip()}…"
    name = told["source"] if told["source"].endswith(told["title"]) else f"{told['title']} ({told['source']})"
    return f"{share} {name}, tokens {told['first_token']:,} to {told['end_token']:,}: {text}"
