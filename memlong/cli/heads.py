"""``memlong heads``: find the K-V heads that make use of distant tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import say
from memlong.cli.loading import load, machine_of
from memlong.cli.output import JsonOutput
from memlong.cli.passages import passages_of
from memlong.errors import InvalidArgumentError

SINKS = 4  # score_heads' default
_HALF = 0.5


def heads(
    model: options.Model,
    text: Annotated[list[Path], typer.Option(help="UTF-8 text similar to what will be read; repeatable.")],
    share: Annotated[float, typer.Option(help="Share of K-V heads to keep, above 0 and at most 1.")] = _HALF,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Choose this many whole layers, for --retrieval-layers, in place of heads."),
    ] = None,
    retrieval_layers: Annotated[
        str, typer.Option(help="'all', or layers and ranges, such as '15-29' or '3,7,11-13'.")
    ] = "all",
    local_window: Annotated[int, typer.Option(min=1, help="Tokens that the other heads attend to.")] = 1024,
    passages: Annotated[int, typer.Option(min=1, help="Passages to read from each text, evenly spaced.")] = 1,
    passage_tokens: Annotated[int, typer.Option(min=2, help="Tokens per passage.")] = 4096,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json_file: options.JsonFile = None,
) -> None:
    """Find retrieval heads: the K-V heads that make the most of distant tokens. Prints them for --retrieval-heads.

    The others then attend to the local window alone: their K-V are neither stored nor retrieved. At the default share,
    half of the bytes are stored.

    With --layers, prints the layers whose heads do so together, for --retrieval-layers. The lowest of them is a good
    memory layer to train with.

    \b
    Examples:
      memlong heads --model demo --text code.py --text book.txt
      memlong heads --model demo --text book.txt --layers 4
      memlong perplexity --model demo --text other.py --retrieval-heads "$(memlong heads --model demo --text code.py)"
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    output = JsonOutput(json_file)
    if not 0 < share <= 1:
        raise InvalidArgumentError(f"--share must be above 0 and at most 1, got {share}")
    if layers is not None and share != _HALF:
        raise InvalidArgumentError(
            f"--layers chooses whole layers, and --share heads, got {layers} and {share}: give one"
        )
    if passage_tokens <= local_window + SINKS:
        raise InvalidArgumentError(
            f"--passage-tokens must be more than {local_window + SINKS}, to see beyond --local-window, got "
            f"{passage_tokens}"
        )
    from memlong.evaluation import read_text
    from memlong.training import score_heads
    from memlong.versions import versions

    words = [read_text(file) for file in text]
    language_model, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    chosen = passages_of(text, words, tokenizer, passages=passages, passage_tokens=passage_tokens)
    machine = machine_of(language_model)
    with tqdm(total=len(chosen) * passage_tokens, unit="tok", desc=f"reading ({machine})") as bar:
        found = score_heads(
            language_model,
            chosen,
            layers=retrieval_layers,
            local_window=local_window,
            sink_tokens=SINKS,
            progress=bar.update,
        )
    if layers is not None and layers > len(found.layers):
        raise InvalidArgumentError(
            f"--layers must be at most {len(found.layers)}, the number of layers scored, got {layers}"
        )
    best = found.best(share) if layers is None else found.best_layers(layers)
    chose = {"share": share, "retrieval_heads": best} if layers is None else {"retrieval_layers": best}
    result = {
        "model": model,
        "texts": [path.name for path in text],
        **chose,
        "scores": dict(zip(map(str, found.layers), found.scores.tolist(), strict=True)),
        "versions": versions(),
    }
    if output.write(result):
        say(best)
