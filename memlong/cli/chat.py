"""``memlong chat``: a conversation over corpora, which can be continued another day."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlong.cli import options
from memlong.cli.answer import escaped, say
from memlong.cli.corpora import choose_reader, layered, load_corpora, needed_notes, open_ids
from memlong.cli.memory import TRAINED, MemoryOptions, with_memory
from memlong.errors import InvalidArgumentError, InvalidTextError, SnapshotError

if TYPE_CHECKING:
    from torch import Tensor

    from memlong.corpus import Corpus
    from memlong.decoder import MemoryDecoder

_END = "/exit"


@with_memory(without=TRAINED)
def chat(
    ctx: typer.Context,
    *,
    memory_folders: Annotated[
        list[Path] | None,
        typer.Option("--memory", metavar="DIR", help="Corpus to talk about; repeatable."),
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the conversation is saved, and continued if it is there."),
    ] = None,
    model: options.ModelUnlessMemory = None,
    adapter: options.Adapter = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens to generate for each answer.")
    ] = 400,
    memory: MemoryOptions,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
) -> None:
    """Talk with a model that remembers the conversation, and the documents of corpora.

    Each line of the input is a message, in the model's chat template if it has one; /exit or the end of the input ends
    the conversation. The corpora do not change.

    \b
    Examples:
      memlong chat --model demo
      memlong chat --memory manual
      memlong chat --memory manual --memory notes --session talk
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    from memlong.bank.snapshot.reader import folder_of
    from memlong.bank.snapshot.writer import check_place

    folders = memory_folders or []
    if session is not None and session.resolve() in {each.resolve() for each in folders}:
        raise InvalidArgumentError(
            f"--session and --memory must be different folders, got {str(session)!r} for both"
        )
    notes = needed_notes(folders) if folders else None
    if session is not None:
        check_place(folder_of(session), "decoder")
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
    _begin(decoder, load_corpora(folders, decoder), session)
    with decoder:
        for words in _messages():
            try:
                turn = _turn(decoder, words)
            except InvalidTextError as error:
                typer.echo(f"memlong: {escaped(str(error))}", err=True)
                continue
            _answer(decoder, turn, max_new_tokens)
            if session is not None:
                decoder.save(session)


def _begin(decoder: MemoryDecoder, corpora: Sequence[Corpus], session: Path | None) -> None:
    """Begin a conversation over corpora, or continue the one that was saved."""
    from memlong.bank.snapshot.manifest import has_manifest
    from memlong.bank.snapshot.reader import folder_of

    top = None
    if session is not None and has_manifest(folder_of(session)):
        _restore(decoder, corpora, session)
        top = decoder.banks[0].top
    if not corpora:
        return
    among = open_ids(corpora)
    if top is None:
        decoder.reset([layered(decoder, corpora, among)])
    else:  # what may be found now, and not what could be when it was saved
        decoder.use_banks([layered(decoder, corpora, among, top)])


def _restore(decoder: MemoryDecoder, corpora: Sequence[Corpus], session: Path) -> None:
    bases = [each.bank for each in corpora]
    try:
        decoder.restore(session, bases=bases)
    except SnapshotError:
        decoder.restore(session, bases=bases, any_bases=True)
        typer.echo(
            escaped(f"{session}: the conversation continues, over other documents than it was saved over"),
            err=True,
        )


def _messages() -> Iterator[str]:
    """Yield what is typed, line by line."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            say("> ", end="")
        line = sys.stdin.readline()
        words = line.strip()
        if not line or words == _END:
            return
        if words:
            yield words


def _turn(decoder: MemoryDecoder, words: str) -> Tensor:
    """Return the token ids [1, tokens] of a message, in the chat template if there is one."""
    from memlong.evaluation import chat_turn, following_turn, tokenize

    tokenizer, begins = decoder.tokenizer, not any(decoder.tokens_read)
    if not getattr(tokenizer, "chat_template", None):
        return tokenize(tokenizer, f"{words}\n" if begins else f"\n{words}\n", begins=begins)
    return chat_turn(tokenizer, words) if begins else following_turn(tokenizer, words)


def _answer(decoder: MemoryDecoder, turn: Tensor, max_new_tokens: int) -> None:
    import torch

    from memlong.decoder import text_streamer
    from memlong.evaluation import end_of_turn
    from memlong.evaluation.numbers import checked_logits

    said: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    streamer = text_streamer(decoder.tokenizer, lambda text: say(text, end=""))
    output = decoder.generate(
        turn, torch.ones_like(turn), logits_processor=[checked_logits], streamer=streamer, **said
    )
    is_cut = output.shape[1] - turn.shape[1] == max_new_tokens
    if is_cut and getattr(decoder.tokenizer, "chat_template", None):
        end = end_of_turn(decoder.tokenizer)
        if end and end[-1] != output[0, -1]:
            decoder.read(torch.tensor([end]))
