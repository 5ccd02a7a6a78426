"""``memlong generate``: read texts into memory, then continue a prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import say
from memlong.cli.choice import choose_decoder
from memlong.cli.files import keep_apart
from memlong.cli.loading import machine_of
from memlong.cli.memory import TRAINED, MemoryOptions, described, with_memory
from memlong.cli.output import JsonOutput
from memlong.cli.question import question_of
from memlong.errors import InvalidArgumentError

_MOST_BEAMS = 4096
_COLDEST, _HOTTEST = 1e-3, 1e3  # beyond these, sampling is greedy or uniform


@with_memory(without=TRAINED)
def generate(
    ctx: typer.Context,
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue or answer, after the context.")],
    model: options.ModelUnlessAdapter = None,
    adapter: options.Adapter = None,
    context: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text file to read first; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 200,
    chat: Annotated[bool, typer.Option(help="Apply the model's chat template to the prompt.")] = False,
    sample: Annotated[bool, typer.Option(help="Sample instead of decoding greedily.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature  [default: the model's, else 1]")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: cumulative probability to sample from  [default: the model's, else 1]"
        ),
    ] = None,
    beams: Annotated[
        int, typer.Option(min=1, max=_MOST_BEAMS, help="Number of beams; 1 disables beam search.")
    ] = 1,
    memory: MemoryOptions,
    control_tokens: Annotated[
        bool,
        typer.Option(
            "--control-tokens",
            help="Parse names of control tokens, such as <|im_end|>, in context and prompt as those tokens.",
        ),
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json_file: options.JsonFile = None,
) -> None:
    """Read texts of any length into memory, then continue a prompt; output is streamed.

    \b
    Examples:
      memlong generate --model demo --context book.txt --prompt "The whale was"
      memlong generate --model demo --context a.txt --context b.txt --chat --prompt "Who is Ahab?"
      memlong generate --adapter trained --context book.txt --prompt "The whale was"
      memlong generate --model demo --context library.txt --store disk=/tmp --store host=1GB --prompt "Call me"
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    keep_apart({"--json": json_file}, {"--context": context or [], **memory.files, "--model": [model]})
    output = JsonOutput(json_file)
    import torch

    from memlong.decoder import printable, text_streamer
    from memlong.evaluation import read_text, tokenize
    from memlong.evaluation.numbers import checked_logits
    from memlong.evaluation.text import check_characters

    if not prompt:
        raise InvalidArgumentError("--prompt must not be empty: give at least one word to continue")
    check_characters("--prompt", prompt)
    texts = [read_text(path) for path in context or []]
    said: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": beams,
        "do_sample": sample,
        "logits_processor": [checked_logits],
    }
    if temperature is not None:
        said["temperature"] = _sampling("--temperature", temperature, _COLDEST, _HOTTEST, sample=sample)
    if top_p is not None:
        said["top_p"] = _sampling("--top-p", top_p, _COLDEST, 1, sample=sample)
    decoder = choose_decoder(
        ctx,
        model,
        adapter,
        memory,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    ).open()
    tokenizer = decoder.tokenizer
    question = question_of(tokenizer, prompt, chat=chat, begins=not texts, control_tokens=control_tokens)
    if not output.is_stdout and beams == 1:
        said["streamer"] = text_streamer(tokenizer, lambda text: say(text, end=""))
    torch.manual_seed(seed)
    with decoder:
        read = 0
        started = time.perf_counter()
        for words in texts:
            read += _read(decoder, tokenize(tokenizer, words, begins=not read, control_tokens=control_tokens))
        reading = time.perf_counter() - started
        started = time.perf_counter()
        sequences = decoder.generate(question, torch.ones_like(question), **said)
        answering = time.perf_counter() - started
        stored = sum(len(bank) for bank in decoder.banks)
    new = sequences[0, question.shape[1] :]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    result = {
        "model": model,
        "adapter": adapter,
        "context": [str(path) for path in context or []],
        "prompt": prompt,
        "answer": answer,
        **described(decoder),
        "context_tokens": read,
        "prompt_tokens": question.shape[1],
        "new_tokens": len(new),
        "chunks_stored": stored,
        "reading_tokens_per_second": read / reading if read else None,
        "new_tokens_per_second": len(new) / answering,
    }
    if output.write(result) and beams > 1:
        say(printable(answer))


def _sampling(option: str, value: float, least: float, most: float, *, sample: bool) -> float:
    if not sample:
        raise InvalidArgumentError(f"{option} only applies to sampling: add --sample, or leave it out")
    if not least <= value <= most:
        raise InvalidArgumentError(
            f"{option} must be a number from {least:g} to {most:g}, got {value}. For greedy decoding, leave out "
            "--sample"
        )
    return value


def _read(decoder: Any, input_ids: Any) -> int:
    with tqdm(total=input_ids.shape[1], unit="tok", desc=f"reading ({machine_of(decoder.model)})") as bar:
        for segment in decoder.stream(input_ids, logits="last"):
            bar.update(segment.tokens.shape[1])
    return int(input_ids.shape[1])
