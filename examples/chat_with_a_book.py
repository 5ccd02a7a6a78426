"""Read a book of any length into memory and chat about it.

Each answer uses the chunks of the book that are relevant to the question. Questions come from --question, or from the
keyboard until an empty line or Ctrl-D.

    python examples/chat_with_a_book.py --book book.txt
    python examples/chat_with_a_book.py --book book.txt --question "Who is Ahab?" --question "What does he want?"
    python examples/chat_with_a_book.py --book library.txt --retriever lm --store host=1GB --store disk=/tmp
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.decoder import choose_machine, text_streamer
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import chat_turn, read_text, tokenize
from memlong.settings import key_values

INTERRUPTED = 130  # typer's exit code for Ctrl-C


def main(
    book: Annotated[Path, typer.Option(help="UTF-8 text.")],
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this instead of reading the keyboard; may be repeated.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    backend: Annotated[str, typer.Option(help="Memory backend.")] = "torch",
    retriever: Annotated[str, typer.Option(help="Retriever by name.")] = "sentence-transformers",
    store: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V", help="Where keys and values are stored, such as host=1GB; may be repeated."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer.")] = 120,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:N', 'mps' or 'auto'.")] = "auto",
) -> None:
    """Chat about a book."""
    if not all(asked.strip() for asked in question or []):
        raise InvalidArgumentError(
            "--question must not be empty: ask something, or leave it out to type questions"
        )
    text = read_text(book)
    config = MemoryConfig(
        backend=backend,
        retriever=retriever,
        store=key_values("--store", store or [], example="host=1GB", as_text={"disk", "dtype"}),
        position_mode="before-window",
    )
    machine = choose_machine(dtype, device)
    dtype, device = machine.names
    typer.echo(f"loading the model… {machine}", err=True)
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    streamer = text_streamer(tokenizer)
    with MemoryDecoder(language_model, tokenizer, config) as decoder:
        pages = tokenize(tokenizer, text)
        with tqdm(total=pages.shape[1], unit="tok", desc=f"{book.name} ({device}, {dtype})") as bar:
            for segment in decoder.stream(pages, logits="last"):
                bar.update(segment.tokens.shape[1])
        for asked in question or _typed():
            typer.echo(f"> {asked}" if question else "")
            # Every question starts from the book alone, without the conversation so far.
            prompt = _prompt(tokenizer, asked)
            decoder.generate(
                prompt,
                prompt.new_ones(prompt.shape),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                remember=False,
            )


def _typed() -> Iterator[str]:
    try:
        yield from iter(lambda: input("> ").strip(), "")
    except EOFError:
        typer.echo()


def _prompt(tokenizer: Any, question: str) -> Any:
    if getattr(tokenizer, "chat_template", None):
        return chat_turn(tokenizer, question, begins=False)
    return tokenize(tokenizer, f"\n\nQuestion: {question}\nAnswer:", begins=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"chat_with_a_book: {error}") from error
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            sys.stderr.write("\nchat_with_a_book: interrupted\n")
        raise
