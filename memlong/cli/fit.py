"""``memlong fit``: fit the maps that compress the K-V of all layers into one latent vector per token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from memlong.cli import options
from memlong.cli.answer import escaped, say
from memlong.cli.files import keep_apart, save_or_keep, writable
from memlong.cli.loading import load, machine_of
from memlong.cli.passages import passages_of, passages_of_facts

_MAPS = (b"memlong-latent-maps",)


def fit(
    model: options.Model,
    text: Annotated[list[Path], typer.Option(help="UTF-8 text similar to what will be stored; repeatable.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write the maps to.")],
    dim: Annotated[
        int | None, typer.Option(help="Dimension of a token's latent vector.", show_default="1152")
    ] = None,
    memory_layer: Annotated[
        int | None, typer.Option(min=0, help="Layer whose keys and values are the vector, as they are.")
    ] = None,
    retrieval_layers: Annotated[
        str, typer.Option(help="'all', or layers and ranges, such as '15-29' or '3,7,11-13'.")
    ] = "all",
    passages: Annotated[int, typer.Option(min=1, help="Passages to read from each text, evenly spaced.")] = 8,
    passage_tokens: Annotated[int, typer.Option(min=2, help="Tokens per passage.")] = 1024,
    facts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also read this many passages each of generated 'dictionary', 'needles' and 'variables' episodes.",
        ),
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
) -> None:
    """Fit the maps between all layers' keys and values and one small latent vector per token, in closed form.

    With --kv-source latent, a decoder stores that vector instead of every layer's keys and values: a tenth of the
    numbers on the demo model, a twentieth of the bytes with --store dtype=int8.

    With --memory-layer, the vector is one layer's keys and values, which all others read through maps.

    \b
    Examples:
      memlong fit --model demo --text book.txt --text other.txt --out maps.safetensors
      memlong fit --model demo --text book.txt --dim 384 --facts 3 --out maps.safetensors
      memlong perplexity --model demo --text novel.txt --kv-source latent --maps maps.safetensors
    """  # noqa: D301 - the backspace makes the help keep these line breaks
    keep_apart({"--out": out}, {"--text": text, "--model": [model]})
    writable(out, replaces=_MAPS, regular=True)
    from memlong.evaluation import read_text, tokenize
    from memlong.training import fit_latent_maps

    words = [read_text(file) for file in text]
    language_model, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    chosen = passages_of(text, words, tokenizer, passages=passages, passage_tokens=passage_tokens)
    if facts:
        filler = [tokenize(tokenizer, each)[0] for each in words]
        chosen += passages_of_facts(
            tokenizer, filler, passages=facts, passage_tokens=passage_tokens, seed=seed
        )
    with tqdm(
        total=len(chosen) * passage_tokens, unit="tok", desc=f"reading ({machine_of(language_model)})"
    ) as bar:
        maps = fit_latent_maps(
            language_model,
            chosen,
            dim=dim,
            memory_layer=memory_layer,
            layers=retrieval_layers,
            progress=bar.update,
            seed=seed,
        )
    save_or_keep(maps.save, out, "maps were")
    say(
        f"{escaped(str(out))}: latent vectors of dimension {maps.dim} for the K-V of {len(maps.layers)} layers "
        f"({machine_of(language_model)})"
    )
