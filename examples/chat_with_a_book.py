"""Read a book of any length into a memory, and talk about it.

Each answer is made with the chunks of the book that the question calls for. Questions come from --question, or one by
one from the keyboard; an empty line ends.

    python examples/chat_with_a_book.py --book book.txt
    python examples/chat_with_a_book.py --book book.txt --question "Who is Ahab?" --question "What does he want?"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.decoder import text_streamer
from memlong.errors import MemlongError
from memlong.evaluation import read_text, tokenize


def main(
    book: Annotated[Path, typer.Option(help="UTF-8 text.")],
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this, and do not wait for the keyboard; may be repeated.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, GGUF file, or 'demo'.")] = "demo",
    backend: Annotated[str, typer.Option(help="Memory backend.")] = "torch",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 120,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or 'cuda:N'.")] = "cpu",
) -> None:
    """Talk about a book."""
    text = read_text(book)
    language_model, tokenizer = load_model(model, dtype=dtype, device=device)
    streamer = text_streamer(tokenizer)
    with MemoryDecoder(
        language_model, tokenizer, MemoryConfig(backend=backend, position_mode="before-window")
    ) as decoder:
        pages = tokenize(tokenizer, text)
        with tqdm(total=pages.shape[1], unit="tok", desc=book.name) as bar:
            for segment in decoder.stream(pages, logits="last"):
                bar.update(segment.tokens.shape[1])
        for asked in question or iter(lambda: input("> "), ""):
            typer.echo(f"> {asked}" if question else "")
            # Every question is put to the book as it was read, not to the talk so far.
            decoder.generate(
                _prompt(tokenizer, asked), max_new_tokens=max_new_tokens, streamer=streamer, remember=False
            )


def _prompt(tokenizer: Any, question: str) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        return tokenize(tokenizer, f"\n\nQuestion: {question}\nAnswer:")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).input_ids


if __name__ == "__main__":
    try:
        typer.run(main)
    except MemlongError as error:
        raise SystemExit(f"chat_with_a_book: {error}") from error
    except EOFError:
        pass
